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
pub(crate) struct RequestWork {
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
pub(crate) struct Capacity {
    /// Most requests.
    pub max_num_seqs: usize,
    /// Blocks of the KV cache that nothing holds.
    pub num_free_blocks: usize,
}

/// When something happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Forecast {
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
pub(crate) struct QueueForecast<'a> {
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
    /// Whether the last one needs another request to end first.
    needs_end: bool,
}

impl<'a> QueueForecast<'a> {
    /// A forecast from what runs, in its order; `None` until a prompt was computed.
    pub(crate) fn new(
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
    pub(crate) fn run(&mut self, work: &RequestWork) -> Duration {
        self.num_free_blocks += self.blocks_for(work.num_held_tokens as f64);
        self.start(work);
        let num_steps = (self.prefilled_at - self.step).ceil().max(1.0);
        to_duration(num_steps * self.step_seconds() + self.prefill_s)
    }

    /// Admits the next of the queue.
    pub(crate) fn admit(&mut self, work: &RequestWork) -> Forecast {
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
    pub(crate) fn first_end(&self) -> Option<Duration> {
        let step = self.ends.peek()?.0.step;
        Some(to_duration(step * self.step_seconds() + self.prefill_s))
    }

    /// Time that a request takes from all others: its prompt's, and its part of the steps of a full engine.
    pub(crate) fn share(&self, work: &RequestWork) -> Duration {
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

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: StepBounds = StepBounds {
        max_step_time: Duration::from_millis(500),
        target_inter_token_latency: Duration::from_millis(250),
        max_num_batched_tokens: 512,
        block_size: 16,
    };

    /// A step takes 10 ms, a token of a prompt 1 ms more; a decode costs nothing beside that.
    fn costs() -> CostModel {
        CostModel { base_s: 10e-3, prefill_s: 1e-3, num_prefill_steps: 1, ..CostModel::default() }
    }

    fn work(num_prefill_tokens: usize, num_output_tokens: f64) -> RequestWork {
        RequestWork { num_prefill_tokens, num_output_tokens, ..RequestWork::default() }
    }

    /// One that only generates, with so many tokens in blocks of its own.
    fn running(num_held_tokens: usize, num_output_tokens: f64) -> RequestWork {
        let num_cached_tokens = num_held_tokens;
        RequestWork { num_cached_tokens, num_held_tokens, num_prefill_tokens: 0, num_output_tokens }
    }

    fn forecast<'a>(
        costs: &'a CostModel,
        max_num_seqs: usize,
        num_free_blocks: usize,
        running: &[RequestWork],
    ) -> QueueForecast<'a> {
        let capacity = Capacity { max_num_seqs, num_free_blocks };
        QueueForecast::new(costs, &BOUNDS, capacity, running.iter().copied()).unwrap()
    }

    fn is_near(time: Duration, expected_ms: f64) -> bool {
        (time.as_secs_f64() * 1e3 - expected_ms).abs() < 1e-3
    }

    #[test]
    fn nothing_is_forecast_before_a_prompt_was_computed() {
        let costs = CostModel { num_decode_steps: 9, ..CostModel::default() };
        let capacity = Capacity { max_num_seqs: 1, num_free_blocks: 9 };
        assert!(QueueForecast::new(&costs, &BOUNDS, capacity, []).is_none());
    }

    #[test]
    fn an_idle_engine_admits_at_once_and_answers_after_the_prompt() {
        let costs = costs();
        let Forecast { admission, first_token, needs_end } =
            forecast(&costs, 1, 100, &[]).admit(&work(40, 5.0));
        assert!(admission.is_zero() && !needs_end);
        assert!(is_near(first_token, 10.0 + 40.0), "{first_token:?}");
    }

    #[test]
    fn whoever_finds_no_slot_waits_for_the_first_end_and_each_later_one_for_the_next() {
        let costs = costs();
        let mut queue = forecast(&costs, 2, 1_000, &[running(16, 30.0), running(16, 10.0)]);
        assert!(is_near(queue.first_end().unwrap(), 10.0 * 10.0));
        let first = queue.admit(&work(0, 5.0));
        assert!(first.needs_end && is_near(first.admission, 100.0), "{first:?}");
        // It ends after five steps, long before the one that has run from the start.
        let second = queue.admit(&work(0, 100.0));
        assert!(second.needs_end && is_near(second.admission, 150.0), "{second:?}");
        let third = queue.admit(&work(0, 1.0));
        assert!(is_near(third.admission, 300.0), "{third:?}");
    }

    #[test]
    fn blocks_bound_what_runs_and_those_of_a_cached_prefix_are_taken_too() {
        let costs = costs();
        // 160 tokens: 10 blocks, and an 11th for what it generates.
        let runs = running(160, 20.0);
        let mut queue = forecast(&costs, 8, 4, &[runs]);
        assert!(!queue.admit(&work(0, 64.0)).needs_end, "32 tokens on average");
        let waits = queue.admit(&work(60, 40.0));
        assert!(waits.needs_end && waits.admission > Duration::from_millis(100), "{waits:?}");
        // A cached prefix lies in blocks that are free or another one's.
        let cached = RequestWork { num_cached_tokens: 48, ..work(12, 8.0) };
        assert!(!forecast(&costs, 8, 2, &[runs]).admit(&cached).needs_end);
        assert!(forecast(&costs, 8, 1, &[runs]).admit(&cached).needs_end);
    }

    #[test]
    fn one_that_is_larger_than_the_cache_is_admitted_once_nothing_runs() {
        let costs = costs();
        let alone = forecast(&costs, 8, 1, &[running(16, 3.0)]).admit(&work(1_000, 8.0));
        assert!(is_near(alone.admission, 30.0), "{alone:?}");
    }

    #[test]
    fn prompts_are_computed_one_after_the_other_and_time_never_goes_back() {
        let costs = costs();
        let mut queue = forecast(&costs, 64, 10_000, &[]);
        let mut last = Forecast { admission: Duration::ZERO, first_token: Duration::ZERO, needs_end: false };
        for index in 0..200 {
            let next = queue.admit(&work(1 + index * 37 % 400, (1 + index * 13 % 50) as f64));
            assert!(next.admission >= last.admission, "{index}: {last:?}, {next:?}");
            assert!(next.first_token > next.admission, "{index}: {next:?}");
            last = next;
        }
        // 38,500 tokens of prompts at 1 ms are before the last one, about.
        assert!((30.0..60.0).contains(&last.admission.as_secs_f64()), "{last:?}");
    }

    #[test]
    fn a_request_takes_its_prompt_and_its_part_of_the_steps_from_others() {
        let costs = costs();
        let queue = forecast(&costs, 4, 1_000, &[running(16, 50.0); 4]);
        // A quarter of each of 20 steps, and 40 tokens of a prompt.
        assert!(is_near(queue.share(&work(40, 20.0)), 20.0 * 10.0 / 4.0 + 40.0));
        let draft = CostModel { drafts_per_decode: 1.0, accepted_per_decode: 1.0, ..costs.clone() };
        let queue = forecast(&draft, 4, 1_000, &[running(16, 50.0); 4]);
        assert!(is_near(queue.share(&work(40, 20.0)), 10.0 * 10.0 / 4.0 + 40.0));
    }
}
