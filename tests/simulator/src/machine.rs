//! Owns a machine in virtual time: a runner that computes nothing, and how long its steps would take.
//!
//! Must not read a clock.

use std::time::Duration;

use glm_engine::StepWork;
use glm_engine::runner::{KvCacheLayout, ModelRunner};
use glm_engine::{Logits, RunError, StepOutput, StepPlan};
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
