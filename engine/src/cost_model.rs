//! Owns what the engine has learnt about time: how long a step takes, how much of a prompt fits into one,
//! and when a first token comes.
//!
//! Plain data: it is told durations and reads no clock. Invariant: no coefficient is negative, and what was
//! learnt from one kind of step outlasts a long stretch of another kind.

mod forecast;
mod prefill_budget;
mod reply_lengths;
mod step_budget;
mod step_fit;
mod step_work;

use std::time::Duration;

use step_fit::StepFit;

pub(crate) use forecast::{Capacity, Forecast, QueueForecast, RequestWork};
pub use prefill_budget::PrefillBudget;
pub(crate) use reply_lengths::{Hazards, LengthCurve, NUM_REMEMBERED_ENDS, ReplyLengths};
pub use step_budget::StepBudget;
pub use step_work::StepWork;

/// Weight of the latest step in how many tokens a step yields to a decode.
const YIELD_RATE: f64 = 0.05;

/// A draft token must be worth this many times its cost: accepted ones make tokens cheaper, and a
/// crowd should not wait for small gains.
const DRAFT_MARGIN: f64 = 1.5;
/// No draft token is cheaper: where a row seems to cost nothing, too little is known yet.
const LEAST_DRAFT_PRICE: f64 = 0.1;
/// One step in so many, of no more decodes than this, takes good draft tokens whatever they seem to cost:
/// steps that are all of one size don't tell a row's cost from the step's.
const TRIAL_PERIOD: u32 = 16;
const MAX_TRIAL_DECODES: usize = 8;
const TRIAL_PRICE: f64 = 0.5;

/// Bounds of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepBounds {
    /// Longest time that may be predicted.
    pub max_step_time: Duration,
    /// The same for a step that also decodes.
    pub target_inter_token_latency: Duration,
    /// Most tokens, decodes included.
    pub max_num_batched_tokens: usize,
    /// Fewest prompt tokens: no step of prompts is smaller, however slow.
    pub block_size: usize,
}

/// A step takes `base + decode * num_decodes + prefill * num_prefill_tokens + pair * num_pairs` seconds: the
/// least squares over the latest steps of each kind.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CostModel {
    /// Seconds of a step.
    pub base_s: f64,
    /// Seconds of a decoded token.
    pub decode_s: f64,
    /// Seconds of a prompt token.
    pub prefill_s: f64,
    /// Seconds of a token's attention to another one.
    pub pair_s: f64,
    /// Rows that a decode has beside its own, on average: draft tokens.
    pub drafts_per_decode: f64,
    /// Of those, rows that yield a token.
    pub accepted_per_decode: f64,
    /// Steps with prompt tokens seen so far.
    pub num_prefill_steps: u32,
    /// Steps without.
    pub num_decode_steps: u32,
    fit: StepFit,
}

impl CostModel {
    /// A step that succeeded took `duration`.
    pub fn observe_step(&mut self, work: &StepWork, duration: Duration) {
        let count = match work.num_prefill_tokens {
            0 => &mut self.num_decode_steps,
            _ => &mut self.num_prefill_steps,
        };
        *count = count.saturating_add(1);
        let costs = [self.base_s, self.decode_s, self.prefill_s, self.pair_s];
        [self.base_s, self.decode_s, self.prefill_s, self.pair_s] =
            self.fit.observe(work, duration.as_secs_f64(), &costs);
    }

    /// A step had so many decodes, and draft tokens beside them, of which some were accepted.
    pub fn observe_drafts(&mut self, num_decodes: usize, num_drafts: usize, num_accepted: usize) {
        let learn = |mean: &mut f64, count: usize| {
            *mean += YIELD_RATE * (count as f64 / num_decodes.max(1) as f64 - *mean);
        };
        if num_decodes > 0 {
            learn(&mut self.drafts_per_decode, num_drafts);
            learn(&mut self.accepted_per_decode, num_accepted);
        }
    }

    /// Tokens that a step yields to a sequence that decodes.
    pub fn tokens_per_decode(&self) -> f64 {
        1.0 + self.accepted_per_decode
    }

    /// Rows of a sequence that decodes.
    pub fn rows_per_decode(&self) -> f64 {
        1.0 + self.drafts_per_decode
    }

    /// What the step that has these `decodes` may spend beside them.
    pub fn step_budget(&self, decodes: &StepWork, bounds: &StepBounds) -> StepBudget {
        StepBudget { prefill: self.prefill_budget(decodes, bounds), draft_price: self.draft_price(decodes) }
    }

    /// How long a step will take; `None` until a step with prompt tokens was seen.
    pub fn predict_step(&self, work: &StepWork) -> Option<Duration> {
        (self.num_prefill_steps > 0).then(|| to_duration(self.step_seconds(work)))
    }

    /// What a step may take of prompts beside `decodes`: a block at least. Nothing more until
    /// something is learnt, so that the first step of a slow machine is short.
    pub fn prefill_budget(&self, decodes: &StepWork, bounds: &StepBounds) -> PrefillBudget {
        let most = bounds.max_num_batched_tokens.saturating_sub(decodes.num_decodes);
        let least = bounds.block_size.min(most);
        if self.num_prefill_steps == 0 {
            return least.into();
        }
        let limit = match decodes.num_decodes {
            0 => bounds.max_step_time,
            _ => bounds.target_inter_token_latency.min(bounds.max_step_time),
        };
        let left_s = limit.as_secs_f64() - self.step_seconds(decodes);
        PrefillBudget::new(most, least, left_s, self.prefill_s, self.pair_s)
    }

    /// The least probability of being accepted at which one more draft token pays beside `decodes`: below it the step
    /// yields fewer tokens a second for everybody. It is the part of a row in the step's time, times the step's
    /// tokens, and half as much again. 1, at which nothing pays, as soon as rows make up
    /// two thirds of the step, and until a step was seen.
    pub fn draft_price(&self, decodes: &StepWork) -> f64 {
        let step_s = self.step_seconds(decodes);
        let rows_s = step_s - self.base_s;
        if self.num_decode_steps == 0 || step_s <= 0.0 {
            return 1.0;
        }
        let price = (DRAFT_MARGIN * rows_s / step_s).clamp(LEAST_DRAFT_PRICE, 1.0);
        let is_trial =
            decodes.num_decodes <= MAX_TRIAL_DECODES && self.num_decode_steps.is_multiple_of(TRIAL_PERIOD);
        if is_trial { price.min(TRIAL_PRICE) } else { price }
    }

    fn step_seconds(&self, work: &StepWork) -> f64 {
        self.base_s
            + self.decode_s * work.num_decodes as f64
            + self.prefill_s * work.num_prefill_tokens as f64
            + self.pair_s * work.num_pairs as f64
    }
}

fn to_duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
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

    fn work(num_prefill_tokens: usize, num_decodes: usize, context: usize) -> StepWork {
        let num_pairs = num_decodes * context + StepWork::pairs(context, num_prefill_tokens);
        StepWork { num_prefill_tokens, num_decodes, num_pairs }
    }

    fn machine(base_ms: f64, decode_ms: f64, prefill_ms: f64) -> impl Fn(&StepWork) -> Duration {
        // Attention to 4,000 tokens costs as much as the rest of a token of a prompt.
        move |work| {
            let tokens = work.num_prefill_tokens as f64 + work.num_pairs as f64 / 4000.0;
            Duration::from_secs_f64(
                (base_ms + decode_ms * work.num_decodes as f64 + prefill_ms * tokens) / 1e3,
            )
        }
    }

    fn learn(model: &mut CostModel, machine: impl Fn(&StepWork) -> Duration, num_steps: usize) {
        for step in 0..num_steps {
            let (num_decodes, context) = (step * 7 % 23, step * 211 % 8000);
            let budget = model.prefill_budget(&work(0, num_decodes, context), &BOUNDS);
            let num_prefill = if step % 3 == 0 { budget.fit(context, 512) } else { 0 };
            let work = work(num_prefill, num_decodes, context);
            model.observe_step(&work, machine(&work));
        }
    }

    #[test]
    fn steps_are_predicted_on_fast_and_slow_machines_and_kept_short() {
        for (base, decode, prefill) in [(2.0, 0.1, 0.05), (30.0, 3.0, 1.5), (150.0, 10.0, 60.0)] {
            let machine = machine(base, decode, prefill);
            let mut model = CostModel::default();
            assert_eq!(model.predict_step(&work(16, 0, 0)), None);
            assert_eq!(model.prefill_budget(&work(0, 0, 0), &BOUNDS).fit(0, 512), 16);
            learn(&mut model, &machine, 600);
            for (num_decodes, context) in [(0, 0), (1, 500), (8, 1000), (20, 500), (4, 8000)] {
                let limit = if num_decodes == 0 { 0.5 } else { 0.25 };
                let budget = model.prefill_budget(&work(0, num_decodes, context), &BOUNDS).fit(context, 512);
                let work = work(budget, num_decodes, context);
                let real = machine(&work).as_secs_f64();
                assert!(budget == 16 || real < 1.2 * limit, "{budget} tokens took {real} s");
                let predicted = model.predict_step(&work).unwrap().as_secs_f64();
                assert!((predicted / real - 1.0).abs() < 0.2, "{predicted} s for {real} s: {work:?}");
            }
        }
    }

    #[test]
    fn one_hiccup_moves_little_and_a_lasting_change_moves_all() {
        let (mut model, work) = (CostModel::default(), work(100, 4, 1000));
        learn(&mut model, machine(30.0, 3.0, 1.5), 300);
        let before = model.predict_step(&work).unwrap();
        model.observe_step(&work, Duration::from_secs(60));
        assert!(model.predict_step(&work).unwrap() < before * 2);
        learn(&mut model, machine(90.0, 9.0, 4.5), 300);
        let ratio = model.predict_step(&work).unwrap().as_secs_f64() / before.as_secs_f64();
        assert!((2.4..3.6).contains(&ratio), "{ratio}");
    }

    /// As a warm-up on an idle machine, which then hangs in each prompt, or in each token.
    #[test]
    fn a_machine_that_becomes_slower_by_far_is_believed_at_once() {
        let mut prompts = warm_up(machine(0.01, 0.01, 0.001), 1);
        let slow = work(16, 0, 0);
        (0..3).for_each(|_| prompts.observe_step(&slow, Duration::from_millis(300)));
        let like_it = prompts.predict_step(&work(14, 0, 0)).unwrap();
        assert!(like_it > Duration::from_millis(100), "{like_it:?}");
        let mut decodes = warm_up(machine(0.01, 0.01, 0.001), 1);
        let slow = work(0, 1, 100);
        (0..20).for_each(|_| decodes.observe_step(&slow, Duration::from_millis(2)));
        let like_it = decodes.predict_step(&slow).unwrap();
        assert!(like_it > Duration::from_millis(1), "{like_it:?}");
    }

    #[test]
    fn decodes_do_not_wear_away_what_prompts_taught() {
        let (mut model, machine) = (CostModel::default(), machine(30.0, 3.0, 1.5));
        learn(&mut model, &machine, 300);
        let prompt = work(200, 0, 1000);
        let before = model.predict_step(&prompt).unwrap().as_secs_f64();
        // They take a little less than before.
        let decodes = work(0, 9, 4000);
        (0..10_000).for_each(|_| model.observe_step(&decodes, machine(&decodes).mul_f64(0.9)));
        let after = model.predict_step(&prompt).unwrap().as_secs_f64();
        assert!((after / before - 1.0).abs() < 0.1, "{before} s, then {after} s");
    }

    /// What a warm-up sees: two prompts, each twice and with a few tokens after it, alone.
    fn warm_up(machine: impl Fn(&StepWork) -> Duration, first_step: u32) -> CostModel {
        let mut model = CostModel::default();
        for (index, num_tokens) in [12, 12, 128, 128].into_iter().enumerate() {
            let (mut start, mut is_first) = (0, index == 0);
            while start < num_tokens {
                let num_new = model.prefill_budget(&work(0, 0, 0), &BOUNDS).fit(start, num_tokens - start);
                let step = match num_new {
                    1 => StepWork { num_decodes: 1, ..work(0, 1, start) },
                    _ => work(num_new, 0, start),
                };
                let time = machine(&step) * if is_first { first_step } else { 1 };
                (start, is_first) = (start + num_new, false);
                model.observe_step(&step, time);
            }
            for position in num_tokens..num_tokens + 3 {
                let step = work(0, 1, position);
                model.observe_step(&step, machine(&step));
            }
        }
        model
    }

    #[test]
    fn a_warm_up_tells_the_cost_of_steps_from_that_of_tokens() {
        let machines = [(6.0, 0.02, 0.015), (6.3, 0.95, 0.7), (2.0, 0.1, 0.05), (150.0, 60.0, 60.0)];
        for ((base, decode, prefill), first_step) in
            machines.into_iter().flat_map(|machine| [(machine, 1), (machine, 50)])
        {
            let machine = machine(base, decode, prefill);
            let model = warm_up(&machine, first_step);
            for work in [work(512, 0, 0), work(64, 0, 500), work(0, 64, 50), work(128, 32, 100)] {
                let (found, real) =
                    (model.predict_step(&work).unwrap().as_secs_f64(), machine(&work).as_secs_f64());
                let factor = found / real;
                // A decode is supposed to cost a little more than a token of a prompt.
                assert!((0.8..1.6).contains(&factor), "{base} ms a step, {factor:.2} times for {work:?}");
            }
        }
    }

    #[test]
    fn a_row_costs_more_the_fuller_the_step_and_the_price_is_found_by_a_lone_stream() {
        let known =
            CostModel { base_s: 6.3e-3, decode_s: 0.95e-3, num_decode_steps: 1, ..CostModel::default() };
        let lone = work(0, 1, 100);
        let prices = [1, 4, 8, 16, 64].map(|num_decodes| known.draft_price(&work(0, num_decodes, 100)));
        assert!(prices.is_sorted() && (0.15..0.25).contains(&prices[0]), "{prices:?}");
        assert_eq!(prices[3..], [1.0, 1.0]);
        assert_eq!(CostModel::default().draft_price(&lone), 1.0);
        assert!(CostModel { decode_s: 0.0, ..known.clone() }.draft_price(&lone) > 0.0);
        // A row's attention is part of its cost.
        let attentive = CostModel { pair_s: 1e-6, ..known };
        assert!(attentive.draft_price(&work(0, 1, 4000)) > 2.0 * attentive.draft_price(&work(0, 1, 1)));
        // Steps of one row only don't tell a step's cost from a row's: prompts say about what that is, and
        // steps with draft tokens say it.
        let machine = machine(6.3, 0.95, 0.7);
        let mut model = warm_up(&machine, 1);
        (0..50).for_each(|_| model.observe_step(&lone, machine(&lone)));
        let supposed = model.draft_price(&lone);
        assert!((0.5..2.0).contains(&(supposed / prices[0])), "{supposed}, not {}", prices[0]);
        for step in 0..100 {
            let num_drafts = (1..8).filter(|&len| 0.95f64.powi(len) > model.draft_price(&lone)).count();
            let rows = work(0, 1 + if step % 3 == 0 { 0 } else { num_drafts }, 100);
            model.observe_step(&rows, machine(&rows));
        }
        let found = model.draft_price(&lone);
        assert!((found / prices[0] - 1.0).abs() < 0.3, "{found}, not {}", prices[0]);
    }
}
