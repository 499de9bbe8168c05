//! Owns a machine in virtual time: a runner that computes nothing, and how long its steps would take.
//!
//! Must not read a clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use glm_engine::StepWork;
use glm_engine::runner::{KvCacheLayout, ModelRunner};
use glm_engine::{Clock, Logits, RunError, StepOutput, StepPlan};
use ndarray::{Array2, s};

/// Ids below this are tokens.
pub const VOCAB_SIZE: usize = 8;

/// A runner whose next token is always the same.
#[derive(Debug)]
pub struct Machine {
    layout: KvCacheLayout,
    logits: Array2<f32>,
}

impl Machine {
    /// A machine with a cache of `num_blocks` blocks of `block_size` tokens.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        let layout = KvCacheLayout { num_blocks, block_size, num_bytes: 0 };
        Self { layout, logits: Array2::zeros((1, VOCAB_SIZE)) }
    }
}

impl ModelRunner for Machine {
    fn kv_cache(&self) -> KvCacheLayout {
        self.layout
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        let num_rows = plan.logits_indices.len();
        if self.logits.nrows() < num_rows {
            self.logits = Array2::zeros((num_rows, VOCAB_SIZE));
        }
        Ok(StepOutput { candidates: None, logits: Logits::Here(self.logits.slice(s![..num_rows, ..])) })
    }
}

/// How long work takes, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    /// A step: its weights are read.
    pub step: f64,
    /// A token of a prompt.
    pub prefill: f64,
    /// A token of a reply.
    pub decode: f64,
    /// A token's attention to another one.
    pub pair: f64,
}

impl Speed {
    /// How long a step takes.
    pub fn time(&self, work: &StepWork) -> Duration {
        Duration::from_secs_f64(
            self.step
                + self.prefill * work.num_prefill_tokens as f64
                + self.decode * work.num_decodes as f64
                + self.pair * work.num_pairs as f64,
        )
    }
}

/// A machine whose steps move a clock on by what they take.
#[derive(Debug)]
pub struct TimedMachine {
    machine: Machine,
    speed: Speed,
    /// The next step takes so many times as long.
    factor: f64,
    /// Nanoseconds.
    now: Arc<AtomicU64>,
}

impl TimedMachine {
    /// A machine of this speed, whose first step takes `first_step` times as long, and its clock.
    pub fn new(num_blocks: usize, block_size: usize, speed: Speed, first_step: f64) -> (Self, Clock) {
        let now = Arc::new(AtomicU64::new(0));
        let read = Arc::clone(&now);
        let clock = Clock::new(move || Duration::from_nanos(read.load(Ordering::SeqCst)));
        (Self { machine: Machine::new(num_blocks, block_size), speed, factor: first_step, now }, clock)
    }

    /// The time on its clock, for who reads it while the machine is an engine's.
    pub fn now(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.now)
    }
}

impl ModelRunner for TimedMachine {
    fn kv_cache(&self) -> KvCacheLayout {
        self.machine.kv_cache()
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        let took = self.speed.time(&StepWork::of(plan)).mul_f64(std::mem::replace(&mut self.factor, 1.0));
        self.now.fetch_add(took.as_nanos() as u64, Ordering::SeqCst);
        self.machine.run(plan)
    }
}
