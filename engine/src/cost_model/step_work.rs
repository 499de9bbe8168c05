//! Owns what a step computes, in the terms in which it costs time.

use crate::step::StepPlan;

/// What a step computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepWork {
    /// Tokens of prompts, or of whatever is computed in more than one token.
    pub num_prefill_tokens: usize,
    /// Sequences that take one token.
    pub num_decodes: usize,
    /// Pairs of a token of the step and a token that it attends to, itself included.
    pub num_pairs: usize,
}

impl StepWork {
    /// What a plan computes.
    pub fn of(plan: &StepPlan) -> Self {
        let mut work = Self::default();
        for sequence in &plan.sequences {
            work.add(sequence.num_computed_tokens, sequence.num_scheduled_tokens);
        }
        work
    }

    /// Adds `num_tokens` tokens of a sequence that has `start` before them.
    pub fn add(&mut self, start: usize, num_tokens: usize) {
        match num_tokens {
            1 => self.num_decodes += 1,
            _ => self.num_prefill_tokens += num_tokens,
        }
        self.num_pairs += Self::pairs(start, num_tokens);
    }

    /// Pairs of `num_tokens` tokens after `start` others.
    pub fn pairs(start: usize, num_tokens: usize) -> usize {
        num_tokens * start + num_tokens * (num_tokens + 1) / 2
    }
}
