//! Owns the forecast of the queue: when each waiting request is admitted, by what runs and what is ahead.
//!
//! It plays the scheduler with whole requests in place of tokens: a request is admitted once a slot and its
//! blocks are free and the prompts before it are computed; it ends after as many steps as its reply is
//! expected to have. Plain data, no clock. Invariant: time never goes back from one request to the next.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Duration;

use super::{CostModel, StepBounds, StepWork, to_duration};

/// A request, as far as others must wait for it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RequestWork {
    /// Tokens before those to compute.
    pub num_cached_tokens: usize,
    /// Of those, tokens in blocks that it holds already; a waiting request holds none.
    pub num_held_tokens: usize,
    /// Tokens to compute before the next one is generated; 0 while it is only generating.
    pub num_prefill_tokens: usize,
    /// Tokens that it is expected to generate.
    pub num_output_tokens: f64,
}

/// What bounds the requests that run together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Most requests.
    pub max_num_seqs: usize,
    /// Blocks of the KV cache that nothing holds.
    pub num_free_blocks: usize,
}

/// When something happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forecast {
    /// Time until it leaves the queue.
    pub admission: Duration,
    /// Time until its first token.
    pub first_token: Duration,
    /// Whether it is admitted only after another one has ended.
    pub needs_end: bool,
}

/// The end of a running request.
#[derive(Debug, Clone, Copy, PartialEq)]
struct End {
    /// In steps from now.
    step: f64,
    num_blocks: f64,
    num_tokens: f64,
}

impl Eq for End {}

impl Ord for End {
    fn cmp(&self, other: &Self) -> Ordering {
        self.step.total_cmp(&other.step)
    }
}

impl PartialOrd for End {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The queue as it is expected to move.
#[derive(Debug)]
pub struct QueueForecast<'a> {
    costs: &'a CostModel,
    bounds: &'a StepBounds,
    max_num_seqs: usize,
    ends: BinaryHeap<Reverse<End>>,
    num_free_blocks: f64,
    /// Tokens of the context of what runs.
    num_context_tokens: f64,
    step: f64,
    seconds: f64,
    /// The step at which all prompts are computed that were admitted.
    prefilled_at: f64,
    /// Time that those take beside the steps, not yet in `seconds`.
    prefill_s: f64,
    /// Whether somebody had to end for the last one.
    needs_end: bool,
}

impl<'a> QueueForecast<'a> {
    /// A forecast from what runs, in its order; `None` until a prompt was computed.
    pub fn new(
        costs: &'a CostModel,
        bounds: &'a StepBounds,
        capacity: Capacity,
        running: impl IntoIterator<Item = RequestWork>,
    ) -> Option<Self> {
        if costs.num_prefill_steps == 0 {
            return None;
        }
        let mut forecast = Self {
            costs,
            bounds,
            max_num_seqs: capacity.max_num_seqs.max(1),
            ends: BinaryHeap::with_capacity(capacity.max_num_seqs + 1),
            num_free_blocks: capacity.num_free_blocks as f64,
            num_context_tokens: 0.0,
            step: 0.0,
            seconds: 0.0,
            prefilled_at: 0.0,
            prefill_s: 0.0,
            needs_end: false,
        };
        for work in running {
            forecast.run(&work);
        }
        Some(forecast)
    }

    /// Adds one to what runs from the start; returns the time until its prompt is computed.
    pub fn run(&mut self, work: &RequestWork) -> Duration {
        self.num_free_blocks += self.blocks_for(work.num_held_tokens as f64);
        self.start(work);
        let num_steps = (self.prefilled_at - self.step).ceil().max(1.0);
        to_duration(num_steps * self.step_seconds() + self.prefill_s)
    }

    /// Admits the next of the queue.
    pub fn admit(&mut self, work: &RequestWork) -> Forecast {
        // Prompts are computed one after the other.
        self.advance(self.prefilled_at);
        let num_blocks = self.num_blocks(work);
        let mut needs_end = self.needs_end;
        while self.ends.len() >= self.max_num_seqs
            || (!self.ends.is_empty() && self.num_free_blocks < num_blocks)
        {
            let Some(&Reverse(end)) = self.ends.peek() else { break };
            self.advance(end.step);
            needs_end = true;
        }
        self.needs_end = needs_end;
        self.seconds += std::mem::take(&mut self.prefill_s);
        let step_s = self.step_seconds();
        let num_steps = (work.num_prefill_tokens as f64 / self.budget(work)).ceil().max(1.0);
        self.start(work);
        let first_token_s = self.seconds + num_steps * step_s + self.prefill_s;
        let [admission, first_token] = [self.seconds, first_token_s].map(to_duration);
        Forecast { admission, first_token, needs_end }
    }

    /// Time until one of those that run has ended, if any does.
    pub fn first_end(&self) -> Option<Duration> {
        let step = self.ends.peek()?.0.step;
        Some(to_duration(step * self.step_seconds() + self.prefill_s))
    }

    /// Time that a request takes from all others: its prompt's, and its part of the steps of a full engine.
    pub fn share(&self, work: &RequestWork) -> Duration {
        let [num_prefill_tokens, num_pairs] =
            [work.num_prefill_tokens, StepWork::pairs(work.num_cached_tokens, work.num_prefill_tokens)]
                .map(|count| count as f64);
        let num_steps = work.num_output_tokens / self.costs.tokens_per_decode();
        let step_s = self.step_seconds() / self.ends.len().max(1) as f64;
        let prefill_s = self.costs.prefill_s * num_prefill_tokens + self.costs.pair_s * num_pairs;
        to_duration(num_steps * step_s + prefill_s)
    }

    /// Lets time pass up to a step, and what ends until then end.
    fn advance(&mut self, step: f64) {
        while let Some(&Reverse(end)) = self.ends.peek().filter(|end| end.0.step <= step) {
            self.pass(end.step);
            self.ends.pop();
            self.num_free_blocks += end.num_blocks;
            self.num_context_tokens -= end.num_tokens;
        }
        self.pass(step);
    }

    fn pass(&mut self, step: f64) {
        if step > self.step {
            self.seconds += (step - self.step) * self.step_seconds();
            self.step = step;
        }
    }

    /// Adds a request to what runs.
    fn start(&mut self, work: &RequestWork) {
        if work.num_prefill_tokens > 0 {
            let num_steps = work.num_prefill_tokens as f64 / self.budget(work);
            self.prefilled_at = self.prefilled_at.max(self.step) + num_steps;
            let num_pairs = StepWork::pairs(work.num_cached_tokens, work.num_prefill_tokens);
            self.prefill_s +=
                self.costs.prefill_s * work.num_prefill_tokens as f64 + self.costs.pair_s * num_pairs as f64;
        }
        let start = if work.num_prefill_tokens > 0 { self.prefilled_at } else { self.step };
        // The last step of a prompt yields a token.
        let num_decodes = work.num_output_tokens - f64::from(u8::from(work.num_prefill_tokens > 0));
        let num_decode_steps = num_decodes.max(0.0) / self.costs.tokens_per_decode();
        let (num_blocks, num_tokens) = (self.num_blocks(work), num_tokens(work));
        self.num_free_blocks -= num_blocks;
        self.num_context_tokens += num_tokens;
        self.ends.push(Reverse(End { step: start + num_decode_steps, num_blocks, num_tokens }));
    }

    fn num_blocks(&self, work: &RequestWork) -> f64 {
        self.blocks_for(num_tokens(work) - (work.num_cached_tokens - work.num_held_tokens) as f64)
    }

    fn blocks_for(&self, num_tokens: f64) -> f64 {
        (num_tokens / self.bounds.block_size.max(1) as f64).ceil()
    }

    /// Time of a step of what runs, beside prompts.
    fn step_seconds(&self) -> f64 {
        self.costs.step_seconds(&self.decodes())
    }

    fn decodes(&self) -> StepWork {
        let num_rows = self.ends.len() as f64 * self.costs.rows_per_decode();
        let num_pairs = self.num_context_tokens * self.costs.rows_per_decode();
        StepWork { num_prefill_tokens: 0, num_decodes: num_rows as usize, num_pairs: num_pairs as usize }
    }

    /// Tokens of a prompt that a step takes, at the middle of it.
    fn budget(&self, work: &RequestWork) -> f64 {
        let half_way = work.num_cached_tokens + work.num_prefill_tokens / 2;
        let budget = self.costs.prefill_budget(&self.decodes(), self.bounds);
        budget.fit(half_way, usize::MAX).max(1) as f64
    }
}

/// Tokens that a request has in the cache, on average over the rest of its life.
fn num_tokens(work: &RequestWork) -> f64 {
    (work.num_cached_tokens + work.num_prefill_tokens) as f64 + work.num_output_tokens / 2.0
}
