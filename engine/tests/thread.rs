//! The engine thread over the fake runner: what a caller can rely on at the edge.

use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use glm_engine::runner::fake::FakeRunner;
use glm_engine::runner::{KvCacheLayout, ModelRunner};
use glm_engine::{
    EngineConfig, EngineGauges, EngineHandle, EngineObserver, EngineThread, EventReceiver, FinishReason,
    LoadError, NoObserver, Request, RunError, SamplingParams, SequenceError, StepOutput, StepPlan,
    SubmitError, TenantId, TokenEvent,
};

const VOCAB_SIZE: usize = 32;

#[derive(Default)]
struct Gauges(Mutex<EngineGauges>);

impl EngineObserver for Gauges {
    fn gauges(&self, gauges: &EngineGauges) {
        *self.0.lock().unwrap() = *gauges;
    }
}

fn spawn(runner: FakeRunner) -> (EngineHandle, EngineThread, Arc<Gauges>) {
    let config =
        EngineConfig { max_num_seqs: 2, max_num_waiting: 2, max_model_len: 1000, ..Default::default() };
    let gauges = Arc::new(Gauges::default());
    let (handle, thread) = EngineThread::spawn(runner, config, VOCAB_SIZE, gauges.clone()).unwrap();
    (handle, thread, gauges)
}

/// Takes 1 ms a token, so that tests can act while sequences run.
fn slow() -> FakeRunner {
    let reply = |_: &[u32]| {
        std::thread::sleep(Duration::from_millis(1));
        Ok(9)
    };
    FakeRunner::scripted(VOCAB_SIZE, 64, 16, Box::new(reply))
}

fn request(max_tokens: usize) -> Request {
    let sampling =
        SamplingParams { temperature: 0.0, max_tokens, stop_token_ids: vec![2], ..Default::default() };
    Request { prompt_token_ids: vec![1; 20], sampling, ..Request::default() }
}

/// The last event of a request.
async fn last(events: &mut EventReceiver) -> Option<TokenEvent> {
    let mut last = None;
    while let Some(event) = events.recv().await {
        last = Some(event);
    }
    last
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..5_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("not within 5 s: {what}");
}

#[tokio::test]
async fn a_request_streams_tokens_and_one_end() {
    let (handle, thread, _) =
        spawn(FakeRunner::scripted(VOCAB_SIZE, 64, 16, Box::new(|h| Ok(if h.len() < 23 { 9 } else { 2 }))));
    let mut events = handle.submit(request(100)).unwrap();
    assert_eq!(events.recv().await, Some(TokenEvent::Admitted { num_cached_tokens: 0 }));
    for _ in 0..3 {
        assert_eq!(events.recv().await, Some(TokenEvent::Token { token_id: 9 }));
    }
    let reason = FinishReason::Stop { token_id: 2 };
    assert_eq!(events.recv().await, Some(TokenEvent::Finished { reason, num_generated_tokens: 4 }));
    assert_eq!(events.recv().await, None);
    drop(handle);
    thread.join();
}

#[tokio::test]
async fn dropping_the_receiver_aborts_running_and_waiting_requests() {
    let (handle, _thread, gauges) = spawn(slow());
    let receivers: Vec<_> = (0..4).map(|_| handle.submit(request(900)).unwrap()).collect();
    until("two run and two wait", || {
        let gauges = *gauges.0.lock().unwrap();
        (gauges.num_running, gauges.num_waiting) == (2, 2)
    })
    .await;
    let refusal = handle.submit(request(900)).unwrap_err();
    assert!(matches!(refusal, SubmitError::QueueFull { num_requests: 4, .. }), "{refusal}");
    drop(receivers);
    until("all blocks are free", || {
        let gauges = *gauges.0.lock().unwrap();
        handle.status().num_requests == 0 && gauges.num_used_blocks == 0 && gauges.num_running == 0
    })
    .await;
}

#[tokio::test]
async fn what_can_never_fit_is_refused_at_the_door() {
    let (handle, _thread, _) = spawn(FakeRunner::hashing(VOCAB_SIZE, 4, 16));
    assert_eq!(handle.limits().max_model_len, 64);
    let refusal = handle.submit(request(45)).unwrap_err();
    assert_eq!(refusal, SubmitError::TooLong { num_tokens: 65, limit: 64 });
    assert!(handle.submit(request(44)).is_ok());
    let empty = Request { prompt_token_ids: vec![], ..request(1) };
    assert!(matches!(handle.submit(empty), Err(SubmitError::InvalidParameter { field: "prompt", .. })));
    let unknown = Request { prompt_token_ids: vec![32], ..request(1) };
    assert!(matches!(handle.submit(unknown), Err(SubmitError::InvalidParameter { field: "prompt", .. })));
}

#[tokio::test]
async fn abort_all_ends_every_request_and_refuses_new_ones() {
    let (handle, _thread, _) = spawn(slow());
    let mut receivers: Vec<_> = (0..4).map(|_| handle.submit(request(900)).unwrap()).collect();
    handle.abort_all();
    for receiver in &mut receivers {
        assert_eq!(last(receiver).await, Some(TokenEvent::Failed(SequenceError::ShuttingDown)));
    }
    assert!(matches!(handle.submit(request(1)), Err(SubmitError::Unavailable(_))));
}

#[tokio::test]
async fn a_failed_step_fails_its_sequences_and_the_next_request_works() {
    let mut num_calls = 0;
    let reply = move |_: &[u32]| {
        num_calls += 1;
        if num_calls == 2 { Err(RunError::new("injected")) } else { Ok(9) }
    };
    let (handle, _thread, _) = spawn(FakeRunner::scripted(VOCAB_SIZE, 64, 16, Box::new(reply)));
    let mut events = handle.submit(request(5)).unwrap();
    assert_eq!(events.recv().await, Some(TokenEvent::Admitted { num_cached_tokens: 0 }));
    assert_eq!(events.recv().await, Some(TokenEvent::Token { token_id: 9 }));
    assert_eq!(events.recv().await, Some(TokenEvent::Failed(SequenceError::Run("injected".into()))));
    assert_eq!(events.recv().await, None);
    let mut events = handle.submit(request(1)).unwrap();
    // The first step's block was computed; nothing of the second one was published.
    assert_eq!(events.recv().await, Some(TokenEvent::Admitted { num_cached_tokens: 16 }));
    assert_eq!(events.recv().await, Some(TokenEvent::Token { token_id: 9 }));
}

#[tokio::test]
async fn a_panic_ends_every_request_with_an_error_and_nothing_hangs() {
    let reply = |history: &[u32]| {
        if history.len() > 25 { panic!("injected") } else { Ok(9) }
    };
    let (handle, thread, _) = spawn(FakeRunner::scripted(VOCAB_SIZE, 64, 16, Box::new(reply)));
    let mut events = handle.submit(request(100)).unwrap();
    assert_eq!(last(&mut events).await, Some(TokenEvent::Failed(SequenceError::EngineDied)));
    assert!(!handle.status().alive);
    assert!(matches!(handle.submit(request(1)), Err(SubmitError::Unavailable(_))));
    thread.join();
}

/// A runner that has something to do first.
struct Preparing {
    runner: FakeRunner,
    prepare: fn() -> Result<(), LoadError>,
}

impl ModelRunner for Preparing {
    fn kv_cache(&self) -> KvCacheLayout {
        self.runner.kv_cache()
    }

    fn prepare(&mut self) -> Result<(), LoadError> {
        (self.prepare)()
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        self.runner.run(plan)
    }
}

#[test]
fn a_runner_is_prepared_on_the_thread_and_what_fails_there_is_said_at_the_start() {
    let start = |prepare| {
        let runner = Preparing { runner: FakeRunner::hashing(VOCAB_SIZE, 64, 16), prepare };
        let config = EngineConfig { max_num_seqs: 3, ..EngineConfig::default() };
        let started = EngineThread::spawn(runner, config, VOCAB_SIZE, Arc::new(NoObserver));
        started.map(drop).map_err(|error| error.to_string())
    };
    let on_thread = || {
        assert_eq!(std::thread::current().name(), Some("engine"));
        Ok(())
    };
    assert_eq!(start(on_thread), Ok(()));
    assert_eq!(start(|| Err(LoadError::Config("no graphs".into()))), Err("no graphs".into()));
    assert!(start(|| panic!("injected")).unwrap_err().contains("preparing panicked"));
}

/// To take a session down, ONNX Runtime calls the device, which can hang or abort once it has failed.
#[test]
fn a_runner_whose_device_failed_while_it_was_prepared_is_never_taken_down() {
    let dropped_within = |prepare, patience| {
        // The reply, and with it this end of the channel, is dropped with the runner.
        let (alive, ended) = std::sync::mpsc::channel::<()>();
        let reply = move |_: &[u32]| {
            let _ = alive.send(());
            Ok(9)
        };
        let runner = Preparing { runner: FakeRunner::scripted(VOCAB_SIZE, 64, 16, Box::new(reply)), prepare };
        let config = EngineConfig { max_num_seqs: 3, ..EngineConfig::default() };
        assert!(EngineThread::spawn(runner, config, VOCAB_SIZE, Arc::new(NoObserver)).is_err());
        ended.recv_timeout(patience) == Err(RecvTimeoutError::Disconnected)
    };
    let no_graphs = || Err(LoadError::Runtime("no graphs".into()));
    assert!(dropped_within(no_graphs, Duration::from_secs(60)));
    let lost = || Err(LoadError::DeviceLost("CUDA failure 700".into()));
    assert!(!dropped_within(lost, Duration::from_millis(300)));
}

/// Requests that arrive during the step that panics are in the command channel, unseen.
#[tokio::test]
async fn a_panic_ends_requests_that_the_thread_never_saw() {
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let reply = move |_: &[u32]| {
        wait.recv().unwrap();
        panic!("injected")
    };
    let (handle, thread, _) = spawn(FakeRunner::scripted(VOCAB_SIZE, 64, 16, Box::new(reply)));
    let mut first = handle.submit(request(100)).unwrap();
    assert_eq!(first.recv().await, Some(TokenEvent::Admitted { num_cached_tokens: 0 }));
    let unseen: Vec<_> = (0..3).map(|_| handle.submit(request(100)).unwrap()).collect();
    go.send(()).unwrap();
    for mut events in unseen.into_iter().chain([first]) {
        let end = tokio::time::timeout(Duration::from_secs(5), last(&mut events)).await.expect("no end");
        assert_eq!(end, Some(TokenEvent::Failed(SequenceError::EngineDied)));
    }
    until("all places are free", || handle.status().num_requests == 0).await;
    thread.join();
}

/// A request that is accepted before `abort_all` and arrives after it is told as well.
#[tokio::test]
async fn abort_all_reaches_requests_that_race_with_it() {
    for _ in 0..200 {
        let (handle, thread, _) = spawn(FakeRunner::hashing(VOCAB_SIZE, 64, 16));
        let other = handle.clone();
        let submitter = std::thread::Builder::new().spawn(move || other.submit(request(900))).unwrap();
        handle.abort_all();
        if let Ok(mut events) = submitter.join().unwrap() {
            let end = tokio::time::timeout(Duration::from_secs(5), last(&mut events)).await;
            let end = end.expect("no end").unwrap();
            let is_told = matches!(end, TokenEvent::Failed(SequenceError::ShuttingDown));
            assert!(is_told || matches!(end, TokenEvent::Finished { .. }), "{end:?}");
        }
        drop(handle);
        thread.join();
    }
}

/// A tenant that takes all the places it may leaves the others theirs.
#[tokio::test]
async fn one_tenant_does_not_fill_the_queue() {
    let config = EngineConfig {
        max_num_seqs: 2,
        max_num_waiting: 2,
        max_model_len: 1000,
        tenant_weights: vec![1, 1],
        max_num_requests_per_tenant: 3,
        ..Default::default()
    };
    let (handle, _thread) = EngineThread::spawn(slow(), config, VOCAB_SIZE, Arc::new(NoObserver)).unwrap();
    let of = |tenant| Request { tenant: TenantId(tenant), ..request(900) };
    let flood: Vec<_> = (0..3).map(|_| handle.submit(of(0)).unwrap()).collect();
    let refusal = handle.submit(of(0)).unwrap_err();
    assert!(matches!(refusal, SubmitError::QueueFull { num_requests: 3, .. }), "{refusal}");
    let _other = handle.submit(of(1)).unwrap();
    let refusal = handle.submit(of(1)).unwrap_err();
    assert!(matches!(refusal, SubmitError::QueueFull { num_requests: 4, .. }), "{refusal}");
    drop(flood);
    until("the places are free", || handle.status().num_requests == 1).await;
    assert!(handle.submit(of(0)).is_ok());
    let unknown = handle.submit(of(2)).unwrap_err();
    assert!(matches!(unknown, SubmitError::InvalidParameter { field: "tenant", .. }), "{unknown}");
    let out_of_range = handle.submit(Request { priority: 101, ..request(1) }).unwrap_err();
    assert!(
        matches!(out_of_range, SubmitError::InvalidParameter { field: "priority", .. }),
        "{out_of_range}"
    );
}
