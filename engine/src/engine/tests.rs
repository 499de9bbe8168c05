//! The engine's loop: speculation (what it saves, what it must not take, what is sampled), and steps that find no
//! memory.

use std::time::Duration;

use ndarray::Array2;

use super::Engine;
use crate::config::EngineConfig;
use crate::cost_model::{StepBudget, StepWork};
use crate::error::{RunError, SequenceError};
use crate::request::{Request, RequestId, TenantId, TokenEvent};
use crate::runner::fake::FakeRunner;
use crate::runner::{KvCacheLayout, ModelRunner};
use crate::sampling_params::SamplingParams;
use crate::step::{Logits, StepOutput, StepPlan};

/// Says 0 1 2 3 4 5 6 0 1 2 … after any of these.
fn counting(num_blocks: usize, block_size: usize) -> FakeRunner {
    let next = |history: &[u32]| Ok((history.last().copied().unwrap_or(0) + 1) % 7);
    FakeRunner::scripted(8, num_blocks, block_size, Box::new(next))
}

fn request(sampling: SamplingParams) -> Request {
    Request { prompt_token_ids: vec![0, 1, 2], sampling, ..Request::default() }
}

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ..Default::default() }
}

fn engine<R: ModelRunner>(runner: R, max_num_draft_tokens: usize) -> Engine<R> {
    let config = EngineConfig { max_num_draft_tokens, ..Default::default() };
    Engine::new(runner, config, 8)
}

/// A hundred tokens of prompts, and drafts that are accepted with this probability at least.
fn budget(draft_price: f64) -> StepBudget {
    StepBudget { prefill: 100.into(), draft_price }
}

/// Runs until nothing is left: the tokens of the first request, and the number of steps.
fn run<R: ModelRunner>(engine: &mut Engine<R>) -> (Vec<u32>, usize) {
    let (mut tokens, mut num_steps) = (Vec::new(), 0);
    while !engine.is_idle() {
        engine.step(Duration::ZERO, budget(0.2));
        engine.scheduler().check().unwrap();
        num_steps += 1;
        tokens.extend(engine.events().iter().filter_map(|(id, event)| match event {
            TokenEvent::Token { token_id } if *id == RequestId(0) => Some(*token_id),
            _ => None,
        }));
    }
    (tokens, num_steps)
}

#[test]
fn a_sequence_that_repeats_takes_fewer_steps_and_says_the_same() {
    let penalties = SamplingParams { frequency_penalty: 2.0, presence_penalty: 1.0, ..greedy(100) };
    let stop_late = SamplingParams { min_tokens: 50, stop_token_ids: vec![4], ..greedy(100) };
    let sampled = SamplingParams { max_tokens: 100, seed: 5, ..Default::default() };
    for sampling in [greedy(100), penalties, stop_late, sampled] {
        let [(expected, num_plain), (found, num_steps)] = [0, 8].map(|max_num_draft_tokens| {
            let mut engine = engine(counting(32, 4), max_num_draft_tokens);
            engine.submit(request(sampling.clone()), Duration::ZERO);
            run(&mut engine)
        });
        assert_eq!(found, expected, "{sampling:?}");
        assert!(num_steps < num_plain, "{num_steps} steps, {num_plain} without: {sampling:?}");
        let is_plain = sampling == greedy(100);
        assert!(!is_plain || num_steps < 40, "{num_steps} steps");
    }
}

#[test]
fn drafts_take_what_is_free_and_give_it_back() {
    // Both, at their end, take every block; they have none in common.
    let mut engine = engine(counting(12, 4), 8);
    for id in 0..2u32 {
        let request = Request { prompt_token_ids: vec![id, id + 1, id + 2], ..request(greedy(21)) };
        engine.submit(request, Duration::ZERO);
    }
    let (mut num_drafted, mut num_used) = (0, 0);
    while !engine.is_idle() {
        let report = engine.step(Duration::ZERO, budget(0.2));
        engine.scheduler().check().unwrap();
        num_drafted += report.num_draft_tokens;
        assert_eq!(report.num_preemptions, 0);
        let needed = |tokens: &[u32]| (tokens.len() - 1).div_ceil(4);
        let num_needed =
            engine.scheduler().running().iter().map(|running| needed(running.sequence.tokens())).sum();
        assert_eq!(engine.scheduler().gauges().num_used_blocks, num_needed, "drafts keep no block");
        num_used = num_used.max(num_needed);
    }
    assert!(num_drafted >= 20 && num_used >= 8, "{num_drafted} {num_used}");
}

/// What a tenant is charged for a reply of so many tokens, and what the next turn of the chat finds cached.
fn charged_and_cached(max_num_draft_tokens: usize, max_tokens: usize) -> (u64, usize) {
    let mut engine = engine(FakeRunner::repeating(8, 64, 4), max_num_draft_tokens);
    let sampling = SamplingParams { ignore_eos: true, ..greedy(max_tokens) };
    engine.submit(request(sampling.clone()), Duration::ZERO);
    let (reply, num_steps) = run(&mut engine);
    assert_eq!((reply.len(), num_steps < max_tokens), (max_tokens, max_num_draft_tokens > 0));
    let service = engine.scheduler().service(TenantId(0));
    let prompt_token_ids = [&[0, 1, 2], reply.as_slice()].concat();
    engine.submit(Request { prompt_token_ids, ..request(sampling) }, Duration::ZERO);
    engine.step(Duration::ZERO, budget(0.2));
    (service, engine.admitted()[0].1.num_cached_tokens)
}

#[test]
fn drafts_change_neither_what_is_charged_nor_what_is_cached() {
    for max_tokens in 30..60 {
        let plain = charged_and_cached(0, max_tokens);
        assert_eq!(charged_and_cached(8, max_tokens), plain, "after {max_tokens} tokens");
        assert_eq!(plain.1, (max_tokens + 2) / 4 * 4, "all that is full and computed");
    }
}

#[test]
fn no_draft_is_made_beside_a_prompt() {
    let mut engine = engine(counting(64, 4), 8);
    engine.submit(request(greedy(100)), Duration::ZERO);
    while engine.step(Duration::ZERO, budget(0.2)).num_draft_tokens < 8 {}
    let prompt = Request { prompt_token_ids: vec![7; 40], ..request(greedy(1)) };
    engine.submit(prompt, Duration::ZERO);
    engine.plan_within(Duration::ZERO, budget(0.2));
    let shares: Vec<usize> = engine.step_plan().sequences.iter().map(|s| s.num_scheduled_tokens).collect();
    assert_eq!(shares, [1, 40]);
}

/// A machine with memory for steps of so many tokens.
struct Small {
    runner: FakeRunner,
    num_tokens: usize,
}

impl ModelRunner for Small {
    fn kv_cache(&self) -> KvCacheLayout {
        self.runner.kv_cache()
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        match plan.num_tokens() {
            num_tokens if num_tokens > self.num_tokens => Err(RunError::out_of_memory("no memory")),
            _ => self.runner.run(plan),
        }
    }
}

#[test]
fn a_step_that_finds_no_memory_is_halved_once_and_nobody_is_the_worse_for_it() {
    let run = |num_tokens| {
        let runner = Small { runner: FakeRunner::hashing(400, 1000, 16), num_tokens };
        let mut engine = Engine::new(runner, EngineConfig::default(), 400);
        engine.submit(request(greedy(30)), Duration::ZERO);
        engine.step(Duration::ZERO, 512);
        engine.submit(Request { prompt_token_ids: vec![7; 400], ..request(greedy(3)) }, Duration::ZERO);
        let (mut tokens, mut reports) = (Vec::new(), Vec::new());
        while !engine.is_idle() {
            reports.push(engine.step(Duration::ZERO, 512));
            engine.scheduler().check().unwrap();
            tokens.extend(engine.events().iter().cloned());
        }
        (tokens, reports)
    };
    let (plenty, _) = run(1000);
    let ends = |events: &[(RequestId, TokenEvent)]| {
        let mut all = events.to_vec();
        all.sort_by_key(|(id, _)| *id);
        all.retain(|(_, event)| !matches!(event, TokenEvent::Admitted { .. }));
        all
    };
    // 401 tokens do not fit, 201 do; and no later step of prompts tries more.
    let (halved, reports) = run(250);
    assert_eq!(ends(&halved), ends(&plenty));
    assert_eq!(reports.iter().filter(|report| report.is_shrunk).count(), 1);
    assert!(reports.iter().all(|report| !report.failed && report.num_scheduled_tokens <= 201));
    // A step that is still too large fails, and a decode beside it fails with it.
    let (failed, reports) = run(100);
    assert_eq!((reports[0].is_shrunk, reports[1].failed, reports.len()), (true, true, 2));
    let is_failure = |event: &TokenEvent| matches!(event, TokenEvent::Failed(SequenceError::Run(_)));
    assert_eq!(failed.iter().filter(|(_, event)| is_failure(event)).count(), 2);
}

/// The same logits after everything.
struct Constant {
    row: [f32; 8],
    logits: Array2<f32>,
}

impl ModelRunner for Constant {
    fn kv_cache(&self) -> KvCacheLayout {
        KvCacheLayout { num_blocks: 1000, block_size: 16, num_bytes: 0 }
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        self.logits = Array2::from_shape_fn((plan.logits_indices.len(), 8), |(_, id)| self.row[id]);
        Ok(StepOutput { candidates: None, logits: Logits::Here(self.logits.view()) })
    }
}

#[test]
fn what_is_sampled_follows_the_distribution_after_accepted_drafts_and_wrong_ones() {
    let row = [3.0, 2.0, 1.5, 0.5, 0.0, 0.0, -1.0, -9.0];
    let weights = row.map(|logit: f32| f64::from(logit).exp());
    let total: f64 = weights.iter().sum();
    // By whether the draft token before was accepted: the token after it.
    let mut counts = [[0usize; 8]; 2];
    for seed in 0..40 {
        let mut engine = engine(Constant { row, logits: Array2::zeros((0, 8)) }, 8);
        let sampling = SamplingParams { seed, max_tokens: 2000, ..Default::default() };
        engine.submit(request(sampling), Duration::ZERO);
        while !engine.is_idle() {
            let report = engine.step(Duration::ZERO, budget(0.05));
            let tokens = engine.events().iter().filter_map(|(_, event)| match event {
                TokenEvent::Token { token_id } => Some(*token_id as usize),
                _ => None,
            });
            if report.num_draft_tokens > 0 {
                tokens.enumerate().for_each(|(index, id)| counts[usize::from(index > 0)][id] += 1);
            }
        }
    }
    for counts in counts {
        let num_draws = counts.iter().sum::<usize>() as f64;
        assert!(num_draws > 1_000.0, "{num_draws}");
        for (count, weight) in counts.into_iter().zip(weights) {
            let p = weight / total;
            let tolerance = 5.0 * (p * (1.0 - p) * num_draws).sqrt() + 5.0;
            assert!((count as f64 - p * num_draws).abs() < tolerance, "{counts:?} for {p}");
        }
    }
}

/// Seconds that a machine would take for so many streams at once, as the engine's thread runs them, after
/// two rounds from which it learns.
fn seconds(model: fn(usize, usize, usize) -> FakeRunner, num_streams: u64, max_drafts: usize) -> f64 {
    const VOCAB_SIZE: usize = 400;
    let config = EngineConfig { max_num_draft_tokens: max_drafts, ..Default::default() };
    let mut engine = Engine::new(model(VOCAB_SIZE, 2000, 16), config, VOCAB_SIZE);
    let mut took_all = 0.0;
    for round in 0..3 {
        took_all = round_seconds(&mut engine, round * num_streams..(round + 1) * num_streams);
    }
    took_all
}

fn round_seconds(engine: &mut Engine<FakeRunner>, ids: std::ops::Range<u64>) -> f64 {
    for id in ids {
        let prompt_token_ids = (0..40).map(|i| ((id * 131 + i * i * 17) % 400) as u32).collect();
        let sampling = SamplingParams { ignore_eos: true, ..greedy(300) };
        engine.submit(Request { prompt_token_ids, ..request(sampling) }, Duration::ZERO);
    }
    let mut now = Duration::ZERO;
    while !engine.is_idle() {
        engine.plan(now);
        let work = StepWork::of(engine.step_plan());
        // A real model's: one row takes 7 ms, 16 rows take 22 ms.
        let took = 6.3e-3 + 0.95e-3 * work.num_decodes as f64 + 0.6e-3 * work.num_prefill_tokens as f64;
        let took = Duration::from_secs_f64(took);
        engine.run();
        engine.finish(took);
        now += took;
    }
    now.as_secs_f64()
}

#[test]
fn drafts_save_time_where_text_repeats_and_cost_a_crowd_nothing() {
    for (num_streams, least_gain) in [(1, 1.3), (4, 1.01), (16, 0.99), (64, 0.99)] {
        let gain = |model| seconds(model, num_streams, 0) / seconds(model, num_streams, 8);
        let (repeating, other) = (gain(FakeRunner::repeating), gain(FakeRunner::hashing));
        println!("{num_streams} streams: {repeating:.2} and {other:.2} times as fast");
        assert!(repeating > least_gain, "{repeating} at {num_streams} streams");
        assert!(other > 0.99, "{other} at {num_streams} streams that don't repeat");
    }
}
