//! A seeded simulator over the fake runner with virtual time: thousands of random requests,
//! aborts, failures and tiny pools, with every invariant checked after every step.
//!
//! `GLMSERVE_SIM_SEED=n` runs one seed; `GLMSERVE_SIM_RUNS=n` more of them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use glm_engine::runner::fake::FakeRunner;
use glm_engine::{
    Engine, EngineConfig, FinishReason, Request, RequestId, RunError, SamplingParams, TokenEvent,
};
use glmserve_tests::rng::Rng;

const VOCAB_SIZE: usize = 96;

/// What a request produced: its tokens and its end.
#[derive(Debug, Clone, PartialEq)]
struct Outcome {
    tokens: Vec<u32>,
    end: Option<TokenEvent>,
}

fn random_request(rng: &mut Rng, max_model_len: usize) -> Request {
    let num_prompt_tokens = rng.range(1..=max_model_len - 1);
    let max_tokens = rng.range(1..=max_model_len - num_prompt_tokens);
    // A shared start now and then, so that histories differ late.
    let is_common = rng.one_in(3);
    let token = |rng: &mut Rng, position| {
        if is_common && position < 20 { 7 } else { rng.range(0..=VOCAB_SIZE - 1) as u32 }
    };
    Request {
        prompt_token_ids: (0..num_prompt_tokens).map(|position| token(rng, position)).collect(),
        sampling: SamplingParams {
            temperature: if rng.one_in(2) { 0.0 } else { 1.0 },
            top_k: rng.range(0..=5) as u32,
            top_p: if rng.one_in(2) { 1.0 } else { 0.9 },
            repetition_penalty: if rng.one_in(4) { 1.2 } else { 1.0 },
            frequency_penalty: if rng.one_in(4) { 0.5 } else { 0.0 },
            seed: rng.next_u64(),
            max_tokens,
            min_tokens: if rng.one_in(4) { max_tokens / 2 } else { 0 },
            ignore_eos: rng.one_in(4),
            stop_token_ids: vec![3, 50],
            ..Default::default()
        },
        deadline: None,
    }
}

/// The same request alone in an engine with room for everything.
fn isolated(request: &Request) -> Outcome {
    let config = EngineConfig { max_model_len: 4096, max_num_batched_tokens: 4096, ..Default::default() };
    let mut engine = Engine::new(FakeRunner::hashing(VOCAB_SIZE, 256, 16), config, VOCAB_SIZE);
    engine.add(RequestId(0), request.clone(), Duration::ZERO);
    let mut outcome = Outcome { tokens: Vec::new(), end: None };
    while !engine.is_idle() {
        engine.step(Duration::ZERO, usize::MAX);
        engine.events().iter().for_each(|(_, event)| record(&mut outcome, event));
    }
    outcome
}

fn record(outcome: &mut Outcome, event: &TokenEvent) {
    assert!(outcome.end.is_none(), "{event:?} after the end");
    match event {
        TokenEvent::Admitted => {}
        TokenEvent::Token { token_id } => outcome.tokens.push(*token_id),
        end => outcome.end = Some(end.clone()),
    }
}

struct Totals {
    num_preemptions: usize,
    num_aborts: usize,
    num_failures: usize,
    num_mixed_steps: usize,
    num_requests: usize,
}

fn simulate(seed: u64, totals: &mut Totals) {
    let mut rng = Rng::new(seed);
    let block_size = [1, 4, 16, 32][rng.range(0..=3)];
    let num_blocks = rng.range(2..=40);
    let max_num_seqs = rng.range(1..=12);
    let config = EngineConfig {
        max_num_seqs,
        max_num_batched_tokens: rng.range(max_num_seqs..=max_num_seqs + 60),
        max_model_len: (num_blocks * block_size).min(200),
        max_num_waiting: 1000,
        watermark_permille: rng.range(0..=200),
        ..Default::default()
    };
    let fails = rng.one_in(4);
    let mut failing = Rng::new(seed ^ 1);
    let runner = FakeRunner::hashing(VOCAB_SIZE, num_blocks, block_size);
    let runner = if fails {
        with_failures(runner, num_blocks, block_size, move || failing.one_in(60))
    } else {
        runner
    };
    let mut engine = Engine::new(runner, config.clone(), VOCAB_SIZE);
    let mut outcomes = BTreeMap::new();
    let mut requests = BTreeMap::new();
    let mut aborted = BTreeSet::new();
    let (mut now, mut next_id, mut num_steps) = (Duration::ZERO, 0, 0);
    let num_requests = rng.range(1..=40);
    while next_id < num_requests || !engine.is_idle() {
        while next_id < num_requests && rng.one_in(3) {
            let id = RequestId(next_id as u64);
            let request = random_request(&mut rng, config.max_model_len);
            requests.insert(id, request.clone());
            outcomes.insert(id, Outcome { tokens: Vec::new(), end: None });
            engine.add(id, request, now);
            next_id += 1;
        }
        if next_id > 0 && rng.one_in(25) {
            let id = RequestId(rng.range(0..=next_id - 1) as u64);
            engine.abort(id);
            aborted.insert(id);
        }
        let report = engine.step(now, usize::MAX);
        engine.check().unwrap_or_else(|broken| panic!("seed {seed}, step {num_steps}: {broken}"));
        let plan = engine.plan();
        assert!(plan.num_tokens() <= config.max_num_batched_tokens, "seed {seed}: budget");
        assert!(plan.sequences.len() <= config.max_num_seqs, "seed {seed}: sequences");
        let is_idle_step = plan.is_empty() && !engine.is_idle();
        assert!(!is_idle_step, "seed {seed}: work is there and nothing was scheduled");
        let num_decodes = plan.sequences.iter().filter(|s| s.num_scheduled_tokens == 1).count();
        totals.num_mixed_steps += usize::from(num_decodes > 0 && num_decodes < plan.sequences.len());
        totals.num_preemptions += report.num_preemptions;
        totals.num_failures += usize::from(report.failed);
        for (id, event) in engine.events() {
            record(outcomes.get_mut(id).unwrap(), event);
        }
        now += Duration::from_millis(rng.range(1..=50) as u64);
        num_steps += 1;
        assert!(num_steps < 1_000_000, "seed {seed}: no end");
    }
    let gauges = engine.gauges();
    assert_eq!((gauges.num_used_blocks, gauges.num_running, gauges.num_waiting), (0, 0, 0), "seed {seed}");
    for (id, outcome) in &outcomes {
        let is_failed = matches!(outcome.end, Some(TokenEvent::Failed(_)));
        if is_failed {
            assert!(fails, "seed {seed}: {id:?} failed");
        }
        if outcome.end.is_none() || is_failed {
            assert!(is_failed || aborted.contains(id), "seed {seed}: {id:?} has no end");
            let expected = isolated(&requests[id]).tokens;
            assert!(expected.starts_with(&outcome.tokens), "seed {seed}: {id:?} differs before its abort");
            continue;
        }
        assert_eq!(*outcome, isolated(&requests[id]), "seed {seed}: {id:?} differs from its isolated run");
    }
    totals.num_aborts += aborted.len();
    totals.num_requests += num_requests;
}

/// The hashing runner, failing a step when `fails` says so.
fn with_failures(
    mut hashing: FakeRunner,
    num_blocks: usize,
    block_size: usize,
    mut fails: impl FnMut() -> bool + Send + 'static,
) -> FakeRunner {
    let reply = move |history: &[u32]| {
        if fails() {
            return Err(RunError("injected".into()));
        }
        hashing.reply(history)
    };
    FakeRunner::scripted(VOCAB_SIZE, num_blocks, block_size, Box::new(reply))
}

#[test]
fn invariants_hold_and_batching_changes_nothing() {
    let env = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().expect(name));
    let seeds = match env("GLMSERVE_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..env("GLMSERVE_SIM_RUNS").unwrap_or(2_000),
    };
    let is_whole = seeds.end - seeds.start > 100;
    let mut totals =
        Totals { num_preemptions: 0, num_aborts: 0, num_failures: 0, num_mixed_steps: 0, num_requests: 0 };
    seeds.for_each(|seed| simulate(seed, &mut totals));
    let Totals { num_preemptions, num_aborts, num_failures, num_mixed_steps, num_requests } = totals;
    println!(
        "{num_requests} requests, {num_preemptions} preemptions, {num_aborts} aborts, {num_failures} failed steps, {num_mixed_steps} mixed steps"
    );
    // The simulation must have met what it is there for.
    let all_met =
        [num_preemptions, num_aborts, num_failures, num_mixed_steps].iter().all(|&count| count > 50);
    assert!(!is_whole || all_met, "the simulation is too tame");
}

/// The oldest request ends within the steps it would need alone plus its prompt's chunks, however
/// many younger ones press: it is never preempted.
#[test]
fn the_oldest_is_never_preempted() {
    let config =
        EngineConfig { max_num_seqs: 8, max_num_batched_tokens: 16, max_model_len: 64, ..Default::default() };
    let mut engine = Engine::new(FakeRunner::hashing(VOCAB_SIZE, 4, 16), config, VOCAB_SIZE);
    let request = |num_prompt_tokens, max_tokens| Request {
        prompt_token_ids: vec![1; num_prompt_tokens],
        sampling: SamplingParams { max_tokens, ignore_eos: true, temperature: 0.0, ..Default::default() },
        deadline: None,
    };
    engine.add(RequestId(0), request(16, 48), Duration::ZERO);
    (1..40).for_each(|id| engine.add(RequestId(id), request(8, 40), Duration::ZERO));
    for _ in 0..48 {
        engine.step(Duration::ZERO, usize::MAX);
        engine.check().unwrap();
    }
    let end = TokenEvent::Finished { reason: FinishReason::Length, num_generated_tokens: 48 };
    assert!(engine.events().contains(&(RequestId(0), end)), "{:?}", engine.events());
}
