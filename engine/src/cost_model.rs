//! Owns what the engine has learnt about time: how long a step takes, how much of a prompt fits into one,
//! and when a first token comes.
//!
//! Plain data: it is told durations and reads no clock. Invariant: no coefficient is negative, and a
//! step moves only those that it depends on, so a long stretch of one kind of step doesn't wear away
//! what was learnt from the other.

mod prefill_budget;
mod step_work;

use std::time::Duration;

pub use prefill_budget::PrefillBudget;
pub use step_work::StepWork;

/// Weight of a new observation, once there are some.
const LEARNING_RATE: f64 = 0.2;
/// An observation counts at most as this many times what was predicted: a hiccup of the machine
/// moves the model a little, a lasting change moves it within a few steps.
const MOST_SURPRISE: f64 = 4.0;
/// A prediction below this is no measure of surprise.
const LEAST_PREDICTION_S: f64 = 1e-3;

/// Pairs of tokens that weigh as much as a token where a step's time is put down to its causes: all
/// causes should be of one magnitude, or the largest gets all the blame.
const PAIRS_PER_TOKEN: f64 = 4096.0;

/// A guessed token must be worth this many times its cost: right guesses make tokens cheaper, and a
/// crowd should not wait for small gains.
const DRAFT_MARGIN: f64 = 1.5;
/// No guess is cheaper: where a row seems to cost nothing, too little is known yet.
const LEAST_DRAFT_PRICE: f64 = 0.1;
/// One step in so many, of no more decodes than this, takes good guesses whatever they seem to cost:
/// steps that are all of one size don't tell a row's cost from the step's.
const TRIAL_PERIOD: u32 = 16;
const MAX_TRIAL_DECODES: usize = 8;
const TRIAL_PRICE: f64 = 0.5;

/// Bounds of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepBounds {
    /// Longest time that may be predicted.
    pub max_step_time: Duration,
    /// The same for a step in which somebody's reply goes on.
    pub target_inter_token_latency: Duration,
    /// Most tokens, decodes included.
    pub max_num_batched_tokens: usize,
    /// Fewest prompt tokens: no step of prompts is smaller, however slow.
    pub block_size: usize,
}

/// Work that is there before a new request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Running sequences that take one token a step.
    pub num_decodes: usize,
    /// Tokens that those attend to in a step.
    pub num_decode_pairs: usize,
    /// Tokens that running sequences must compute before their next token, decodes apart.
    pub num_running_prefill_tokens: usize,
    /// Tokens of the requests that will be admitted before this one.
    pub num_tokens_ahead: usize,
    /// Those requests.
    pub num_requests_ahead: usize,
    /// Requests that can be admitted without another one's end.
    pub num_free_slots: usize,
    /// Requests that run together when there are enough of them.
    pub num_slots: usize,
}

/// A step takes `base + decode * num_decodes + prefill * num_prefill_tokens + pair * num_pairs` seconds,
/// learnt by normalised least mean squares; a request runs for `residence` seconds from admission to end, an
/// exponentially weighted mean.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CostModel {
    /// Seconds of a step.
    pub base_s: f64,
    /// Seconds of a decoded token.
    pub decode_s: f64,
    /// Seconds of a prompt token.
    pub prefill_s: f64,
    /// Seconds of a token's attention to another one.
    pub pair_s: f64,
    /// Seconds that a request runs.
    pub residence_s: f64,
    /// Steps with prompt tokens seen so far.
    pub num_prefill_steps: u32,
    /// Steps without.
    pub num_decode_steps: u32,
    /// Ended requests seen so far.
    pub num_residences: u32,
}

impl CostModel {
    /// A step that succeeded took `duration`.
    pub fn observe_step(&mut self, work: &StepWork, duration: Duration) {
        let count = match work.num_prefill_tokens {
            0 => &mut self.num_decode_steps,
            _ => &mut self.num_prefill_steps,
        };
        let rate = learning_rate(count);
        let [prefill, decodes] = [work.num_prefill_tokens, work.num_decodes].map(|count| count as f64);
        // Guesses multiply rows and pairs of a decode alike: only prompts tell the two apart.
        let taught_pairs = if work.num_prefill_tokens > 0 { work.num_pairs } else { 0 };
        let pairs = taught_pairs as f64 / PAIRS_PER_TOKEN;
        let predicted = self.step_seconds(work);
        let mut error = duration.as_secs_f64() - predicted;
        if rate <= LEARNING_RATE {
            error = error.min((MOST_SURPRISE - 1.0) * predicted.max(LEAST_PREDICTION_S));
        }
        let scale = rate * error / (1.0 + prefill * prefill + decodes * decodes + pairs * pairs);
        self.base_s = (self.base_s + scale).max(0.0);
        self.decode_s = (self.decode_s + scale * decodes).max(0.0);
        self.prefill_s = (self.prefill_s + scale * prefill).max(0.0);
        self.pair_s = (self.pair_s + scale * pairs / PAIRS_PER_TOKEN).max(0.0);
    }

    /// A request ended `duration` after its admission.
    pub fn observe_residence(&mut self, duration: Duration) {
        let rate = learning_rate(&mut self.num_residences);
        self.residence_s += rate * (duration.as_secs_f64() - self.residence_s);
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

    /// The least chance to yield a token at which one more row pays beside `decodes`: below it the step yields fewer tokens a second for everybody. It is the part of a row in the step's time,
    /// times the step's tokens, and half as much again. 1, at which nothing pays, as soon as rows make up
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

    /// Predicted time to the first token of a request that is submitted now and has `num_tokens` to compute
    /// after `num_cached_tokens`. `None` until a prompt was computed and, if all places are taken, until a
    /// request has ended.
    pub fn time_to_first_token(
        &self,
        load: &Load,
        num_cached_tokens: usize,
        num_tokens: usize,
        bounds: &StepBounds,
    ) -> Option<Duration> {
        if self.num_prefill_steps == 0 {
            return None;
        }
        let decodes = StepWork {
            num_prefill_tokens: 0,
            num_decodes: load.num_decodes,
            num_pairs: load.num_decode_pairs,
        };
        // Half-way through its prompt; what others have cached before theirs is not known here.
        let half_way = num_cached_tokens + num_tokens / 2;
        let budget = self.prefill_budget(&decodes, bounds).fit(half_way, usize::MAX).max(1);
        let own_pairs_s = self.pair_s * StepWork::pairs(num_cached_tokens, num_tokens) as f64;
        let seconds = |num_tokens: usize| {
            let num_steps = num_tokens.div_ceil(budget) as f64;
            num_steps * self.step_seconds(&decodes) + self.prefill_s * num_tokens as f64 + own_pairs_s
        };
        let all = seconds(load.num_running_prefill_tokens + load.num_tokens_ahead + num_tokens);
        let num_ends = (load.num_requests_ahead + 1).saturating_sub(load.num_free_slots);
        let first = if num_ends == 0 {
            all
        } else {
            let wait = self.seconds_between_ends(load.num_slots)? * num_ends as f64;
            all.max(wait + seconds(num_tokens))
        };
        Some(to_duration(first))
    }

    /// Mean time between the ends of two of `num_slots` requests; `None` until one has ended.
    pub fn time_between_ends(&self, num_slots: usize) -> Option<Duration> {
        self.seconds_between_ends(num_slots).map(to_duration)
    }

    fn seconds_between_ends(&self, num_slots: usize) -> Option<f64> {
        (self.num_residences > 0).then(|| self.residence_s / num_slots.max(1) as f64)
    }

    fn step_seconds(&self, work: &StepWork) -> f64 {
        self.base_s
            + self.decode_s * work.num_decodes as f64
            + self.prefill_s * work.num_prefill_tokens as f64
            + self.pair_s * work.num_pairs as f64
    }
}

/// Counts an observation and returns its weight: the plain mean first, then an exponential one.
fn learning_rate(count: &mut u32) -> f64 {
    *count = count.saturating_add(1);
    (1.0 / f64::from(*count)).max(LEARNING_RATE)
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

    #[test]
    fn decodes_do_not_wear_away_what_prompts_taught() {
        let mut model = CostModel::default();
        learn(&mut model, machine(30.0, 3.0, 1.5), 300);
        let before = (model.prefill_s, model.pair_s);
        (0..10_000).for_each(|_| model.observe_step(&work(0, 9, 4000), Duration::from_millis(33)));
        assert_eq!((model.prefill_s, model.pair_s), before);
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
        assert!(CostModel { decode_s: 0.0, ..known }.draft_price(&lone) > 0.0);
        // A row's attention is part of its cost.
        let attentive = CostModel { pair_s: 1e-6, ..known };
        assert!(attentive.draft_price(&work(0, 1, 4000)) > 2.0 * attentive.draft_price(&work(0, 1, 1)));
        // Steps of one row only don't tell a step's cost from a row's; those with guesses do.
        let machine = machine(6.3, 0.95, 1.0);
        let mut model = CostModel::default();
        (0..50).for_each(|_| model.observe_step(&lone, machine(&lone)));
        let dear = model.draft_price(&lone);
        assert!((0.7..0.8).contains(&dear), "{dear}");
        for step in 0..100 {
            let num_drafts = (1..8).filter(|&len| 0.95f64.powi(len) > model.draft_price(&lone)).count();
            let rows = work(0, 1 + if step % 3 == 0 { 0 } else { num_drafts }, 100);
            model.observe_step(&rows, machine(&rows));
        }
        let found = model.draft_price(&lone);
        assert!((found / prices[0] - 1.0).abs() < 0.3, "{found}, not {}", prices[0]);
    }

    #[test]
    fn the_first_token_waits_for_work_ahead_and_for_places() {
        let model = CostModel {
            base_s: 0.1,
            prefill_s: 0.001,
            residence_s: 8.0,
            num_prefill_steps: 1,
            num_residences: 1,
            ..CostModel::default()
        };
        let estimate = |load: Load, num_tokens| {
            let estimate = model.time_to_first_token(&load, 0, num_tokens, &BOUNDS).unwrap();
            (estimate.as_secs_f64() * 1e3).round()
        };
        // 400 tokens fill a step.
        let idle = Load { num_free_slots: 4, num_slots: 4, ..Load::default() };
        assert_eq!(estimate(idle, 100), 200.0);
        assert_eq!(estimate(idle, 800), 1000.0);
        assert_eq!(
            estimate(Load { num_tokens_ahead: 600, num_running_prefill_tokens: 100, ..idle }, 100),
            1000.0
        );
        // Two places are free and two are ahead: one of four requests must end first.
        let busy = Load { num_requests_ahead: 2, num_free_slots: 2, ..idle };
        assert_eq!(estimate(busy, 100), 2200.0);
        let unlearnt = CostModel { num_residences: 0, ..model };
        assert_eq!(unlearnt.time_to_first_token(&busy, 0, 100, &BOUNDS), None);
        assert_eq!(CostModel::default().time_to_first_token(&idle, 0, 1, &BOUNDS), None);
    }
}
