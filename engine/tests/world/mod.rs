//! Owns an engine in virtual time that tests move: a fake runner that does what a prompt's tokens say.

#![allow(dead_code, reason = "each test program uses a part")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use glm_engine::runner::fake::FakeRunner;
use glm_engine::runner::{KvCacheLayout, ModelRunner};
use glm_engine::{
    Clock, EngineConfig, EngineHandle, EngineThread, EventReceiver, Logits, NoObserver, PrefixCaching,
    Request, RunError, SamplingParams, StepOutput, StepPlan, TokenEvent,
};

const VOCAB_SIZE: usize = 32;

/// What the runner does with a token that a prompt consists of.
pub(crate) const NAN: u32 = 11;
pub(crate) const ERROR: u32 = 12;
/// Each step with it waits for a word, those that go on with such a prompt too.
pub(crate) const HANG: u32 = 13;
pub(crate) const PLAIN: u32 = 1;

/// So long nothing takes on any machine: it ends tests that would hang.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Time that nobody but these tests moves, in microseconds: a machine under load teaches the engine nothing
/// else.
#[derive(Clone, Default)]
pub(crate) struct Time(Arc<AtomicU64>);

impl Time {
    pub(crate) fn advance(&self, time: Duration) {
        self.0.fetch_add(time.as_micros() as u64, Ordering::SeqCst);
    }

    fn clock(&self) -> Clock {
        let now = Arc::clone(&self.0);
        Clock::new(move || Duration::from_micros(now.load(Ordering::SeqCst)))
    }
}

/// A fake to which a step is 1 ms and a token 0.1 ms, and which does what the tokens say.
struct Machine {
    fake: FakeRunner,
    time: Time,
    hanging: mpsc::Sender<()>,
    release: mpsc::Receiver<()>,
    largest_step: Arc<AtomicUsize>,
    logits: ndarray::Array2<f32>,
}

impl ModelRunner for Machine {
    fn kv_cache(&self) -> KvCacheLayout {
        self.fake.kv_cache()
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        self.largest_step.fetch_max(plan.num_tokens(), Ordering::SeqCst);
        self.time.advance(Duration::from_micros(1_000 + 100 * plan.num_tokens() as u64));
        if plan.token_ids.contains(&(HANG as i32)) {
            // The test may have ended.
            let _ = self.hanging.send(());
            let _ = self.release.recv();
        }
        if plan.token_ids.contains(&(ERROR as i32)) {
            return Err(RunError::new("injected"));
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

pub(crate) struct World {
    pub(crate) handle: EngineHandle,
    pub(crate) time: Time,
    pub(crate) hanging: mpsc::Receiver<()>,
    pub(crate) release: mpsc::Sender<()>,
    pub(crate) largest_step: Arc<AtomicUsize>,
}

pub(crate) fn start(config: EngineConfig) -> World {
    let (hangs, hanging) = mpsc::channel();
    let (release, released) = mpsc::channel();
    let (time, largest_step) = (Time::default(), Arc::new(AtomicUsize::new(0)));
    let reply = |history: &[u32]| Ok(if history[0] == HANG { HANG } else { 9 });
    let machine = Machine {
        fake: FakeRunner::scripted(VOCAB_SIZE, 256, 16, Box::new(reply)),
        time: time.clone(),
        hanging: hangs,
        release: released,
        largest_step: Arc::clone(&largest_step),
        logits: ndarray::Array2::zeros((0, 0)),
    };
    let (handle, _) =
        EngineThread::spawn_by(time.clock(), machine, config, VOCAB_SIZE, Arc::new(NoObserver)).unwrap();
    World { handle, time, hanging, release, largest_step }
}

impl World {
    /// Waits until a step hangs. What is published stands still then.
    pub(crate) fn hang(&self) {
        self.hanging.recv_timeout(LONG).expect("a step hangs");
    }

    /// Lets the step that hangs end, and each of the next ones, until something is so in one.
    pub(crate) fn step_until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        for _ in 0..1_000 {
            if condition() {
                return;
            }
            self.release.send(()).unwrap();
            self.hang();
        }
        panic!("not within 1,000 steps: {what}");
    }
}

pub(crate) fn config() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 2,
        max_num_waiting: 2,
        max_model_len: 2000,
        // Prompts are all alike here, and are to take time.
        prefix_caching: PrefixCaching::Off,
        // The fake says one token only: draft tokens would hide the pace.
        max_num_draft_tokens: 0,
        ..Default::default()
    }
}

pub(crate) fn request(token: u32, num_prompt_tokens: usize, max_tokens: usize) -> Request {
    let sampling = SamplingParams { temperature: 0.0, max_tokens, ignore_eos: true, ..Default::default() };
    Request { prompt_token_ids: vec![token; num_prompt_tokens], sampling, ..Request::default() }
}

pub(crate) async fn last(events: &mut EventReceiver) -> TokenEvent {
    let mut last = None;
    while let Some(event) = events.recv().await {
        last = Some(event);
    }
    last.expect("there is an end")
}

pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..LONG.as_millis() {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("not within {LONG:?}: {what}");
}

/// Some requests, one after another, so that the engine knows its pace.
pub(crate) async fn teach(handle: &EngineHandle) {
    for num_tokens in [40, 200, 100, 300] {
        let mut events = handle.submit(request(PLAIN, num_tokens, 20)).unwrap();
        assert!(matches!(last(&mut events).await, TokenEvent::Finished { .. }));
    }
}
