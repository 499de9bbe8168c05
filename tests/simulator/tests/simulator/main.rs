//! A seeded simulator over the fake runner with virtual time: thousands of random requests,
//! aborts, failures, deadlines, priorities, tenants, detached readers, probes, common prefixes, prompt
//! budgets that vary by step and tiny pools, with draft tokens that are checked in the same step, and with
//! every invariant checked after every step.
//!
//! `GLMSERVE_SIM_SEED=n` runs one seed; `GLMSERVE_SIM_RUNS=n` more of them.

mod admission;
mod estimates;
mod fairness;
mod latency;
mod scale;
mod starvation;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use glm_engine::runner::fake::{FakeRunner, NOT_FINITE};
use glm_engine::{
    Engine, EngineConfig, PrefixCaching, Request, RequestId, RunError, SamplingParams, TenantId, TokenEvent,
};
use glm_engine::{StepBudget, StepWork};
use glm_simulator::cache::CacheCheck;
use glm_simulator::order::OrderCheck;
use glm_simulator::rng::Rng;

const VOCAB_SIZE: usize = 96;

/// What a request produced: its tokens and its end.
#[derive(Debug, Clone, PartialEq)]
struct Outcome {
    tokens: Vec<u32>,
    end: Option<TokenEvent>,
}

/// `history` is what was said before.
fn random_request(rng: &mut Rng, max_model_len: usize, history: Option<&[u32]>) -> Request {
    let num_prompt_tokens = rng.range(1..=max_model_len - 1);
    let max_tokens = rng.range(1..=max_model_len - num_prompt_tokens);
    // A shared start now and then, so that histories differ late.
    let start = match rng.range(0..=3) {
        0 => vec![7; 20],
        1 => (0..rng.range(0..=100) as u32).map(|position| position % 11).collect(),
        2 => history.unwrap_or_default().to_vec(),
        _ => Vec::new(),
    };
    let token = |rng: &mut Rng, position| {
        start.get(position).copied().unwrap_or_else(|| rng.range(0..=VOCAB_SIZE - 1) as u32)
    };
    Request {
        prompt_token_ids: (0..num_prompt_tokens).map(|position| token(rng, position)).collect(),
        tenant: TenantId(rng.range(0..=2) as u32),
        priority: rng.range(0..=2) as i32 - 1,
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
        deadline: rng.one_in(2).then(|| Duration::from_millis(rng.range(0..=1_500) as u64)),
        ..Request::default()
    }
}

/// What a runner computes.
#[derive(Clone, Copy)]
struct Model {
    make: fn(usize, usize, usize) -> FakeRunner,
    num_candidates: usize,
}

impl Model {
    /// A runner with so many blocks of this size.
    fn runner(self, num_blocks: usize, block_size: usize) -> FakeRunner {
        (self.make)(VOCAB_SIZE, num_blocks, block_size).with_candidates(self.num_candidates)
    }
}

/// The same request alone in an engine with room for everything, without draft tokens.
fn isolated(request: &Request, model: Model) -> Outcome {
    let config = EngineConfig {
        max_model_len: 4096,
        max_num_batched_tokens: 4096,
        max_num_draft_tokens: 0,
        ..Default::default()
    };
    let mut engine = Engine::new(model.runner(256, 16), config, VOCAB_SIZE);
    engine.submit(Request { tenant: TenantId(0), ..request.clone() }, Duration::ZERO);
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
        TokenEvent::Admitted { .. } => {}
        TokenEvent::Token { token_id } => outcome.tokens.push(*token_id),
        end => outcome.end = Some(end.clone()),
    }
}

#[derive(Debug, Default)]
struct Totals {
    num_preemptions: usize,
    num_aborts: usize,
    num_failures: usize,
    num_shrunk: usize,
    num_non_finite: usize,
    num_from_candidates: usize,
    num_mixed_steps: usize,
    num_requests: usize,
    num_probes: usize,
    num_detached_preempted: usize,
    num_overtakings: usize,
    num_yielded: usize,
    num_cut_steps: usize,
    num_cached_tokens: usize,
    num_cached_again: usize,
    num_priorities_passed_over: usize,
    num_drafts: usize,
    num_accepted_drafts: usize,
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
        default_deadline: Duration::from_millis(rng.range(0..=1_000) as u64),
        watermark_permille: rng.range(0..=200),
        tenant_weights: vec![1, 1, 3],
        honours_priority: rng.one_in(2),
        prefix_caching: [PrefixCaching::Off, PrefixCaching::Shared, PrefixCaching::PerTenant]
            [rng.range(0..=2)],
        max_num_draft_tokens: rng.range(0..=9),
        ..Default::default()
    };
    let make = if rng.one_in(2) { FakeRunner::hashing } else { FakeRunner::repeating };
    // Fewer than some requests need, so that whole rows are looked at, too.
    let model = Model { make, num_candidates: if rng.one_in(2) { 0 } else { 4 } };
    let fails = rng.one_in(4);
    // As the server plans; else budgets that a machine could hardly lead to.
    let learns = rng.one_in(3);
    let mut failing = Rng::new(seed ^ 1);
    let runner = model.runner(num_blocks, block_size);
    let runner = if fails {
        let script = move || match failing.range(0..=119) {
            0 | 1 => Some(Failure::Step),
            2 => Some(Failure::Row),
            3 => Some(Failure::Memory),
            _ => None,
        };
        with_failures(runner, num_blocks, block_size, script).with_candidates(model.num_candidates)
    } else {
        runner
    };
    let mut engine = Engine::new(runner, config.clone(), VOCAB_SIZE);
    let mut outcomes = BTreeMap::new();
    let mut requests = BTreeMap::new();
    let mut aborted = BTreeSet::new();
    let mut order = OrderCheck::new(config.honours_priority, config.default_deadline);
    let mut cache = CacheCheck::new(config.prefix_caching, block_size);
    let mut probe = None;
    let (mut now, mut next_id, mut num_steps) = (Duration::ZERO, 0, 0);
    let num_requests = rng.range(1..=40);
    while next_id < num_requests || !engine.is_idle() {
        while next_id < num_requests && rng.one_in(3) {
            let id = RequestId(next_id as u64);
            let history = cache.history(rng.next_u64() as usize);
            let request = random_request(&mut rng, config.max_model_len, history);
            requests.insert(id, request.clone());
            outcomes.insert(id, Outcome { tokens: Vec::new(), end: None });
            next_id += 1;
            // A probe must fit beside nobody, as all of them, and there is one at a time.
            if probe.is_none() && rng.one_in(10) {
                probe = Some(id);
                engine.submit_probe(request, now);
                order.add_probe(id);
                totals.num_probes += 1;
                continue;
            }
            let deadline = request.deadline.unwrap_or(Duration::MAX).min(config.default_deadline);
            order.add(id, &request, now + deadline);
            cache.add(id, &request);
            engine.submit(request, now);
        }
        if next_id > 0 && rng.one_in(25) {
            let id = RequestId(rng.range(0..=next_id - 1) as u64);
            engine.abort(id);
            order.abort(id);
            probe = probe.filter(|&probe| probe != id);
            aborted.insert(id);
        }
        if next_id > 0 && rng.one_in(4) {
            engine.set_detached(RequestId(rng.range(0..=next_id - 1) as u64), rng.one_in(2));
        }
        let budget = if learns || rng.one_in(3) { usize::MAX } else { rng.range(0..=50) };
        let draft_price = [0.0, 0.1, 0.5][rng.range(0..=2)];
        order.before(&engine, now);
        if learns {
            engine.plan(now);
        } else {
            engine.plan_within(now, StepBudget { prefill: budget.into(), draft_price });
        }
        // While a step runs, draft tokens are in the blocks, and the engine is asked for its load.
        engine.scheduler().check().unwrap_or_else(|broken| panic!("seed {seed}, plan {num_steps}: {broken}"));
        assert!(engine.scheduler().num_free_slots() <= config.max_num_seqs, "seed {seed}: free places");
        engine.run();
        let took = Duration::from_millis(rng.range(1..=50) as u64);
        let report = engine.finish(took);
        let cached = engine.events().iter().try_for_each(|(id, event)| cache.event(*id, event));
        let checks = order.after(&engine, now).and(cached).and(engine.scheduler().check());
        checks.unwrap_or_else(|broken| panic!("seed {seed}, step {num_steps}: {broken}"));
        let plan = engine.step_plan();
        // A probe is one more than the step was made for: its sequence, and a token of its prompt.
        let num_extra = usize::from(probe.is_some());
        assert!(plan.num_tokens() <= config.max_num_batched_tokens + num_extra, "seed {seed}: tokens");
        assert!(plan.sequences.len() <= config.max_num_seqs + num_extra, "seed {seed}: sequences");
        let num_prefill_tokens = StepWork::of(plan).num_prefill_tokens;
        let num_budgeted = num_prefill_tokens + report.num_draft_tokens;
        assert!(num_budgeted <= budget.max(block_size), "seed {seed}: prompt budget");
        // A draft token costs nobody its blocks, neither in its step nor after it.
        assert!(report.num_preemptions == 0 || report.num_draft_tokens == 0, "seed {seed}: preempted");
        for running in engine.scheduler().running() {
            let num_needed = running.sequence.tokens().len().div_ceil(block_size);
            assert!(running.block_table.blocks().len() <= num_needed, "seed {seed}: {running:?}");
        }
        totals.num_cut_steps += usize::from(num_prefill_tokens == budget.max(block_size));
        let is_idle_step = plan.is_empty() && !engine.is_idle();
        assert!(!is_idle_step, "seed {seed}: work is there and nothing was scheduled");
        let num_decodes = plan.sequences.iter().filter(|s| s.num_known_tokens() == 1).count();
        totals.num_mixed_steps += usize::from(num_decodes > 0 && num_decodes < plan.sequences.len());
        totals.num_preemptions += report.num_preemptions;
        totals.num_cached_again += order.num_cached_again(&engine);
        totals.num_failures += usize::from(report.failed);
        totals.num_shrunk += usize::from(report.is_shrunk);
        totals.num_non_finite += report.num_non_finite;
        totals.num_from_candidates += report.num_generated_tokens * usize::from(model.num_candidates > 0);
        totals.num_drafts += report.num_draft_tokens;
        totals.num_accepted_drafts += report.num_accepted_draft_tokens;
        for (id, event) in engine.events() {
            record(outcomes.get_mut(id).unwrap(), event);
            probe = probe.filter(|probe| !event.is_terminal() || probe != id);
        }
        now += took;
        num_steps += 1;
        assert!(num_steps < 1_000_000, "seed {seed}: no end");
    }
    let gauges = engine.scheduler().gauges();
    assert_eq!((gauges.num_used_blocks, gauges.num_running, gauges.num_waiting), (0, 0, 0), "seed {seed}");
    for (id, outcome) in &outcomes {
        let is_failed = matches!(outcome.end, Some(TokenEvent::Failed(_)));
        if is_failed {
            assert!(fails, "seed {seed}: {id:?} failed");
        }
        if outcome.end.is_none() || is_failed {
            assert!(is_failed || aborted.contains(id), "seed {seed}: {id:?} has no end");
            let expected = isolated(&requests[id], model).tokens;
            assert!(expected.starts_with(&outcome.tokens), "seed {seed}: {id:?} differs before its abort");
            continue;
        }
        assert_eq!(
            *outcome,
            isolated(&requests[id], model),
            "seed {seed}: {id:?} differs from its isolated run"
        );
    }
    totals.num_aborts += aborted.len();
    totals.num_requests += num_requests;
    totals.num_detached_preempted += order.num_detached_preempted;
    totals.num_overtakings += order.num_overtakings;
    totals.num_yielded += order.num_yielded;
    totals.num_priorities_passed_over += order.num_priorities_passed_over;
    totals.num_cached_tokens += cache.num_cached_tokens;
}

/// What goes wrong in a step.
enum Failure {
    /// All of it.
    Step,
    /// One row, which is not a number.
    Row,
    /// All of it, for want of memory.
    Memory,
}

/// A runner that fails when `fails` says so.
fn with_failures(
    mut model: FakeRunner,
    num_blocks: usize,
    block_size: usize,
    mut fails: impl FnMut() -> Option<Failure> + Send + 'static,
) -> FakeRunner {
    let reply = move |history: &[u32]| match fails() {
        Some(Failure::Step) => Err(RunError::new("injected")),
        Some(Failure::Row) => Ok(NOT_FINITE),
        Some(Failure::Memory) => Err(RunError::out_of_memory("injected")),
        None => model.reply(history),
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
    let mut totals = Totals::default();
    seeds.for_each(|seed| simulate(seed, &mut totals));
    println!("{totals:?}");
    // The simulation must have met what it is there for.
    let Totals { num_preemptions, num_aborts, num_failures, num_mixed_steps, .. } = totals;
    let Totals { num_probes, num_detached_preempted, num_overtakings, num_cut_steps, .. } = totals;
    let Totals { num_cached_tokens, num_cached_again, num_priorities_passed_over, .. } = totals;
    let met = [num_preemptions, num_aborts, num_failures, num_mixed_steps, num_probes];
    let met_in_order = [num_detached_preempted, num_overtakings, num_cut_steps, totals.num_yielded];
    let met_in_cache = [num_cached_tokens, num_cached_again, num_priorities_passed_over];
    let met_in_rows = [totals.num_non_finite, totals.num_from_candidates, totals.num_shrunk];
    let met_in_drafts = [totals.num_accepted_drafts, totals.num_drafts - totals.num_accepted_drafts];
    let met = met.iter().chain(&met_in_order).chain(&met_in_cache).chain(&met_in_drafts).chain(&met_in_rows);
    let all_met = met.into_iter().all(|&count| count > 50);
    assert!(!is_whole || all_met, "the simulation is too tame");
}
