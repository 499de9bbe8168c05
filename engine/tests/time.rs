//! Time and health at the engine's edge: deadlines, estimates, progress, the watchdog, faults, probes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use glm_engine::runner::fake::FakeRunner;
use glm_engine::runner::{KvCacheLayout, ModelRunner};
use glm_engine::{
    EngineConfig, EngineHandle, EngineThread, EventReceiver, Fault, Logits, NoObserver, PrefixCaching,
    Request, RunError, SamplingParams, SequenceError, Stage, StepOutput, StepPlan, SubmitError, TokenEvent,
};

const VOCAB_SIZE: usize = 32;

/// What the runner does with a token that a prompt consists of.
const NAN: u32 = 11;
const ERROR: u32 = 12;
const HANG: u32 = 13;
const PLAIN: u32 = 1;

/// A fake that takes 1 ms a step and 0.1 ms a token, and does what the tokens say.
struct Machine {
    fake: FakeRunner,
    hang: mpsc::Receiver<()>,
    largest_step: Arc<AtomicUsize>,
    logits: ndarray::Array2<f32>,
}

impl ModelRunner for Machine {
    fn kv_cache(&self) -> KvCacheLayout {
        self.fake.kv_cache()
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        self.largest_step.fetch_max(plan.num_tokens(), Ordering::SeqCst);
        std::thread::sleep(Duration::from_micros(1_000 + 100 * plan.num_tokens() as u64));
        if plan.token_ids.contains(&(HANG as i32)) {
            let _ = self.hang.recv();
        }
        if plan.token_ids.contains(&(ERROR as i32)) {
            return Err(RunError("injected".into()));
        }
        self.logits = self.fake.run(plan)?.logits.rows()?.to_owned();
        for (scheduled, &start) in plan.sequences.iter().zip(&plan.cumulative_sequence_length) {
            if plan.token_ids[start as usize] == NAN as i32 {
                scheduled.logits_rows().for_each(|row| self.logits.row_mut(row).fill(f32::NAN));
            }
        }
        Ok(StepOutput { candidates: None, logits: Logits::Here(self.logits.view()) })
    }
}

struct World {
    handle: EngineHandle,
    release: mpsc::Sender<()>,
    largest_step: Arc<AtomicUsize>,
}

fn start(config: EngineConfig) -> World {
    let (release, hang) = mpsc::channel();
    let largest_step = Arc::new(AtomicUsize::new(0));
    let machine = Machine {
        fake: FakeRunner::scripted(VOCAB_SIZE, 256, 16, Box::new(|_| Ok(9))),
        hang,
        largest_step: Arc::clone(&largest_step),
        logits: ndarray::Array2::zeros((0, 0)),
    };
    let (handle, _) = EngineThread::spawn(machine, config, VOCAB_SIZE, Arc::new(NoObserver)).unwrap();
    World { handle, release, largest_step }
}

fn config() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 2,
        max_num_waiting: 2,
        max_model_len: 2000,
        // Prompts are all alike here, and are to take time.
        prefix_caching: PrefixCaching::Off,
        // The fake says one token only: guesses would hide the pace.
        max_num_draft_tokens: 0,
        ..Default::default()
    }
}

fn request(token: u32, num_prompt_tokens: usize, max_tokens: usize) -> Request {
    let sampling = SamplingParams { temperature: 0.0, max_tokens, ignore_eos: true, ..Default::default() };
    Request { prompt_token_ids: vec![token; num_prompt_tokens], sampling, ..Request::default() }
}

async fn last(events: &mut EventReceiver) -> TokenEvent {
    let mut last = None;
    while let Some(event) = events.recv().await {
        last = Some(event);
    }
    last.expect("there is an end")
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

/// Some requests, one after another, so that the engine knows its pace.
async fn teach(handle: &EngineHandle) {
    for num_tokens in [40, 200, 100, 300] {
        let mut events = handle.submit(request(PLAIN, num_tokens, 20)).unwrap();
        assert!(matches!(last(&mut events).await, TokenEvent::Finished { .. }));
    }
}

#[tokio::test]
async fn a_deadline_that_cannot_be_met_is_refused_once_the_pace_is_known() {
    let World { handle, .. } = start(config());
    assert_eq!(handle.estimate(100), None);
    let urgent = Request { deadline: Some(Duration::from_millis(1)), ..request(PLAIN, 1000, 1) };
    let mut events = handle.submit(urgent.clone()).unwrap();
    last(&mut events).await;
    teach(&handle).await;
    // 1,000 tokens take 100 ms.
    let estimate = handle.estimate(1000).unwrap();
    assert!((50..1_000).contains(&estimate.as_millis()), "{estimate:?}");
    match handle.submit(urgent.clone()).unwrap_err() {
        SubmitError::DeadlineUnmeetable { estimate, retry_after } => {
            assert!(estimate > Duration::from_millis(50), "{estimate:?}");
            assert!(retry_after >= Duration::from_millis(100), "{retry_after:?}");
        }
        other => panic!("{other}"),
    }
    assert_eq!(handle.status().num_requests, 0);
    let patient = Request { deadline: Some(Duration::from_secs(20)), ..urgent.clone() };
    last(&mut handle.submit(patient).unwrap()).await;
    // Refusals teach nothing, so they don't go on for ever while nothing runs.
    let num_refusals = (0..1_000).take_while(|_| handle.submit(urgent.clone()).is_err()).count();
    assert!((5..1_000).contains(&num_refusals), "{num_refusals}");
}

#[tokio::test]
async fn a_prompt_that_is_cached_is_taken_where_another_one_is_refused() {
    let World { handle, .. } = start(EngineConfig { prefix_caching: PrefixCaching::Shared, ..config() });
    teach(&handle).await;
    last(&mut handle.submit(request(2, 1000, 1)).unwrap()).await;
    let deadline = handle.estimate(1000).unwrap() / 2;
    let urgent = |token| Request { deadline: Some(deadline), ..request(token, 1000, 1) };
    let mut cached = handle.submit(urgent(2)).unwrap();
    let expected = cached.progress().estimate.unwrap();
    assert!(expected < deadline, "{expected:?} of {deadline:?}");
    assert_eq!(cached.recv().await, Some(TokenEvent::Admitted { num_cached_tokens: 992 }));
    last(&mut cached).await;
    let refused = handle.submit(urgent(3)).unwrap_err();
    assert!(matches!(refused, SubmitError::DeadlineUnmeetable { .. }), "{refused}");
}

#[tokio::test]
async fn a_full_queue_says_when_a_place_will_be_free() {
    let World { handle, .. } = start(config());
    let fill = || (0..4).map(|_| handle.submit(request(PLAIN, 20, 1900)).unwrap()).collect::<Vec<_>>();
    let full = |handle: &EngineHandle| match handle.submit(request(PLAIN, 1, 1)).unwrap_err() {
        SubmitError::QueueFull { num_requests: 4, retry_after } => retry_after,
        other => panic!("{other}"),
    };
    let receivers = fill();
    assert_eq!(full(&handle), Duration::from_secs(1));
    drop(receivers);
    until("empty", || handle.status().num_requests == 0).await;
    // 100 tokens at a bit more than 1 ms, two at a time.
    last(&mut handle.submit(request(PLAIN, 20, 400)).unwrap()).await;
    let _receivers = fill();
    let retry_after = full(&handle);
    assert!((100..900).contains(&retry_after.as_millis()), "{retry_after:?}");
}

#[tokio::test]
async fn progress_moves_from_waiting_to_prefill_to_decode() {
    let max_step_time = Duration::from_millis(2);
    let World { handle, .. } = start(EngineConfig { max_num_seqs: 1, max_step_time, ..config() });
    teach(&handle).await;
    let first = handle.submit(request(PLAIN, 20, 300)).unwrap();
    let second = handle.submit(request(PLAIN, 20, 100)).unwrap();
    let mut third = handle.submit(request(PLAIN, 400, 500)).unwrap();
    let stage = |events: &EventReceiver| events.progress().stage;
    until("one runs, two wait", || {
        stage(&first) == Stage::Decode
            && stage(&second) == Stage::Waiting { position: 0 }
            && stage(&third) == Stage::Waiting { position: 1 }
    })
    .await;
    let estimates = [&first, &second, &third].map(|events| events.progress().estimate);
    assert!(estimates[0].is_none() && estimates[1] < estimates[2], "{estimates:?}");
    assert!(estimates[1].is_some(), "{estimates:?}");
    drop(first);
    until("the next moves up", || stage(&third) == Stage::Waiting { position: 0 }).await;
    drop(second);
    assert_eq!(third.recv().await, Some(TokenEvent::Admitted { num_cached_tokens: 0 }));
    let mut seen = Vec::new();
    until("the prompt is computed", || {
        if let Stage::Prefill { num_computed_tokens, num_tokens } = stage(&third) {
            assert_eq!(num_tokens, 400);
            seen.push(num_computed_tokens);
            assert!(third.progress().estimate.is_some());
        }
        stage(&third) == Stage::Decode
    })
    .await;
    seen.dedup();
    assert!(seen.is_sorted() && seen.len() > 3, "{seen:?}");
}

#[tokio::test]
async fn steps_are_no_longer_than_configured() {
    let max_step_time = Duration::from_millis(5);
    let World { handle, largest_step, .. } = start(EngineConfig { max_step_time, ..config() });
    teach(&handle).await;
    last(&mut handle.submit(request(PLAIN, 1900, 10)).unwrap()).await;
    // 1 ms, and 40 tokens in the other four; a machine under load may have taught it less.
    let largest = largest_step.load(Ordering::SeqCst);
    assert!((16..=80).contains(&largest), "{largest} tokens in a step");
}

#[tokio::test]
async fn a_hang_shows_while_it_lasts() {
    let stall_min = Duration::from_millis(30);
    let World { handle, release, .. } = start(EngineConfig { stall_min, stall_factor: 3, ..config() });
    let unlearnt = handle.status();
    assert_eq!((unlearnt.stalled_for, unlearnt.stall_limit), (None, stall_min * 3));
    teach(&handle).await;
    until("idle", || handle.status().stalled_for.is_none()).await;
    let mut events = handle.submit(request(HANG, 5, 1)).unwrap();
    until("the hang shows", || {
        let status = handle.status();
        status.stalled_for.is_some_and(|time| time > status.stall_limit)
    })
    .await;
    assert!(handle.status().stall_limit >= stall_min);
    assert_eq!(handle.status().num_requests, 1);
    release.send(()).unwrap();
    last(&mut events).await;
    until("idle again", || handle.status().stalled_for.is_none()).await;
}

#[tokio::test]
async fn nan_fails_its_sequence_only_and_a_probe_works_through_the_fault() {
    let World { handle, .. } = start(config());
    let mut healthy = handle.submit(request(PLAIN, 20, 200)).unwrap();
    let mut sick = handle.submit(request(NAN, 8, 10)).unwrap();
    let end = last(&mut sick).await;
    assert_eq!(end, TokenEvent::Failed(SequenceError::NonFiniteLogits { position: 7 }));
    assert_eq!(handle.status().fault, Some(Fault::NonFiniteLogits));
    let mut probe = handle.submit_probe(request(PLAIN, 20, 3)).unwrap();
    assert!(matches!(last(&mut probe).await, TokenEvent::Finished { .. }));
    assert_eq!(handle.status().fault, Some(Fault::NonFiniteLogits));
    handle.clear_fault();
    assert!(matches!(last(&mut healthy).await, TokenEvent::Finished { .. }));
    assert_eq!(handle.status().fault, None);
}

#[tokio::test]
async fn only_errors_in_a_row_are_a_fault() {
    let World { handle, .. } = start(config());
    for (token, count) in [(ERROR, 0), (ERROR, 0), (PLAIN, 0), (ERROR, 0), (ERROR, 0), (ERROR, 3), (ERROR, 4)]
    {
        let end = last(&mut handle.submit(request(token, 5, 1)).unwrap()).await;
        assert_eq!(matches!(end, TokenEvent::Failed(SequenceError::Run(_))), token == ERROR, "{end:?}");
        let is_set = || handle.status().fault == Some(Fault::RepeatedRunErrors { count });
        until("the fault is as expected", || {
            if count == 0 { handle.status().fault.is_none() } else { is_set() }
        })
        .await;
    }
    assert!(matches!(
        last(&mut handle.submit_probe(request(PLAIN, 5, 1)).unwrap()).await,
        TokenEvent::Finished { .. }
    ));
    handle.clear_fault();
    assert_eq!(handle.status().fault, None);
}

#[tokio::test]
async fn a_probe_passes_a_full_queue_and_there_is_one_at_a_time() {
    let World { handle, .. } = start(config());
    let users: Vec<_> = (0..4).map(|_| handle.submit(request(PLAIN, 20, 1900)).unwrap()).collect();
    let full = handle.submit(request(PLAIN, 1, 1)).unwrap_err();
    assert!(matches!(full, SubmitError::QueueFull { num_requests: 4, .. }), "{full}");
    let mut probe = handle.submit_probe(request(PLAIN, 20, 5)).unwrap();
    let second = handle.submit_probe(request(PLAIN, 1, 1)).unwrap_err();
    assert!(matches!(second, SubmitError::QueueFull { num_requests: 5, .. }), "{second}");
    // Long before any user's request can have ended.
    let end = tokio::time::timeout(Duration::from_secs(1), last(&mut probe)).await.unwrap();
    assert!(matches!(end, TokenEvent::Finished { num_generated_tokens: 5, .. }));
    assert_eq!(handle.status().num_requests, 4);
    assert!(handle.submit_probe(request(PLAIN, 1, 1)).is_ok());
    drop(users);
}

#[tokio::test]
async fn detached_requests_give_way_to_attached_ones() {
    // The prompts take 251 of 256 blocks.
    let config = EngineConfig { max_num_seqs: 3, watermark_permille: 0, ..config() };
    let World { handle, .. } = start(config);
    let detached = handle.submit(request(PLAIN, 1500, 400)).unwrap();
    detached.set_detached(true);
    let attached = handle.submit(request(PLAIN, 1500, 400)).unwrap();
    let third = handle.submit(request(PLAIN, 1000, 900)).unwrap();
    until("all run", || third.progress().stage == Stage::Decode).await;
    until("the detached one is preempted", || matches!(detached.progress().stage, Stage::Waiting { .. }))
        .await;
    assert!(!matches!(attached.progress().stage, Stage::Waiting { .. }));
    assert!(!matches!(third.progress().stage, Stage::Waiting { .. }));
}
