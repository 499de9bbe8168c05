//! Owns the proofs that nothing starves: loads that would starve somebody under another order.

use std::time::Duration;

use glm_engine::runner::fake::FakeRunner;
use glm_engine::{
    Engine, EngineConfig, FinishReason, Request, RequestId, SamplingParams, TenantId, TokenEvent,
};

use crate::VOCAB_SIZE;

/// A greedy request of exactly this size.
pub(crate) fn request(num_prompt_tokens: usize, max_tokens: usize) -> Request {
    Request {
        prompt_token_ids: vec![1; num_prompt_tokens],
        sampling: SamplingParams { max_tokens, ignore_eos: true, temperature: 0.0, ..Default::default() },
        ..Default::default()
    }
}

/// The oldest request ends within the steps it would need alone plus its prompt's chunks, however
/// many younger ones press: it is never preempted.
#[test]
fn the_oldest_is_never_preempted() {
    let config =
        EngineConfig { max_num_seqs: 8, max_num_batched_tokens: 16, max_model_len: 64, ..Default::default() };
    let mut engine = Engine::new(FakeRunner::hashing(VOCAB_SIZE, 4, 16), config, VOCAB_SIZE);
    engine.submit(request(16, 48), Duration::ZERO);
    for _ in 1..40 {
        engine.submit(request(8, 40), Duration::ZERO);
    }
    for _ in 0..48 {
        engine.step(Duration::ZERO, usize::MAX);
        engine.scheduler().check().unwrap();
    }
    let end = TokenEvent::Finished { reason: FinishReason::Length, num_generated_tokens: 48 };
    assert!(engine.events().contains(&(RequestId(0), end)), "{:?}", engine.events());
}

/// Urgent requests arrive faster than they can be served, for ever. One without a deadline is still
/// admitted as soon as its default deadline lies before theirs.
#[test]
fn urgent_requests_do_not_starve_patient_ones() {
    let config = EngineConfig {
        max_num_seqs: 2,
        max_model_len: 64,
        default_deadline: Duration::from_secs(5),
        ..Default::default()
    };
    let mut engine = Engine::new(FakeRunner::hashing(VOCAB_SIZE, 8, 16), config, VOCAB_SIZE);
    let urgent = Request { deadline: Some(Duration::from_secs(1)), ..request(8, 10) };
    for _ in 0..2 {
        engine.submit(urgent.clone(), Duration::ZERO);
    }
    engine.step(Duration::ZERO, usize::MAX);
    engine.submit(request(8, 10), Duration::ZERO);
    let admitted_at = (1..3_000u64).find(|&step| {
        let now = Duration::from_millis(10 * step);
        engine.submit(urgent.clone(), now);
        engine.step(now, usize::MAX);
        engine.scheduler().check().unwrap();
        engine.events().contains(&(RequestId(2), TokenEvent::Admitted { num_cached_tokens: 0 }))
    });
    // Due at 5 s, as are the urgent ones of the fourth second: served at a fifth of their pace, these
    // are nearly all served before it.
    let is_fair = admitted_at.is_some_and(|step| (400..=2_500).contains(&step));
    assert!(is_fair, "admitted at step {admitted_at:?}");
}

/// Attached requests arrive for ever, each just small enough to be let in beside a detached one and
/// then to take its blocks before its long history is computed again. Still the detached one ends.
#[test]
fn attached_requests_do_not_starve_detached_ones() {
    let config = EngineConfig {
        max_num_seqs: 2,
        max_model_len: 64,
        default_deadline: Duration::from_millis(50),
        watermark_permille: 0,
        ..Default::default()
    };
    let mut engine = Engine::new(FakeRunner::hashing(VOCAB_SIZE, 16, 4), config, VOCAB_SIZE);
    let detached = engine.submit(request(56, 8), Duration::ZERO);
    engine.set_detached(detached, true);
    let (mut num_requests, mut num_preemptions) = (1, 0);
    let (mut last_gain, mut longest_gap) = (0, 0);
    let num_steps = (0..2_000).find(|&step| {
        let now = Duration::from_millis(step);
        while engine.scheduler().num_waiting() < 4 {
            engine.submit(request(3, 60), now);
            num_requests += 1;
        }
        // One block of a prompt a step: 14 steps and more for the detached one.
        num_preemptions += engine.step(now, 0).num_preemptions;
        engine.scheduler().check().unwrap();
        let is_gain = |(id, event): &(RequestId, TokenEvent)| {
            *id == detached && matches!(event, TokenEvent::Token { .. })
        };
        if engine.events().iter().any(is_gain) {
            longest_gap = longest_gap.max(step - last_gain);
            last_gain = step;
        }
        let end = TokenEvent::Finished { reason: FinishReason::Length, num_generated_tokens: 8 };
        engine.events().contains(&(detached, end))
    });
    assert!(num_preemptions > 0, "the pool is not small enough");
    // The default deadline, what runs until it ends (60 tokens behind a prompt), and 16 blocks computed again.
    assert!(longest_gap <= 50 + 61 + 16 + 2, "{longest_gap} steps without a token");
    assert!(num_steps.is_some(), "not ended after {num_requests} requests and {num_preemptions} preemptions");
}

/// A detached request that was preempted lacks blocks for hundreds of steps. A small attached one that comes
/// meanwhile is let in at once.
#[test]
fn nobodys_request_keeps_nobody_waiting() {
    let config =
        EngineConfig { max_num_seqs: 3, max_model_len: 400, watermark_permille: 0, ..Default::default() };
    let mut engine = Engine::new(FakeRunner::hashing(VOCAB_SIZE, 100, 4), config, VOCAB_SIZE);
    let prompt = |first: u32, len: u32| (first..first + len).map(|id| id % 90).collect::<Vec<u32>>();
    let detached =
        engine.submit(Request { prompt_token_ids: prompt(0, 200), ..request(200, 150) }, Duration::ZERO);
    engine.set_detached(detached, true);
    engine.submit(Request { prompt_token_ids: prompt(7, 100), ..request(100, 299) }, Duration::ZERO);
    let is_waiting =
        |engine: &Engine<FakeRunner>, id| engine.scheduler().waiting().iter().any(|s| s.id == id);
    let mut step = 0;
    let mut next = |engine: &mut Engine<FakeRunner>| {
        step += 1;
        engine.step(Duration::from_millis(step), usize::MAX);
        engine.scheduler().check().unwrap();
    };
    next(&mut engine);
    while !is_waiting(&engine, detached) {
        next(&mut engine);
    }
    let small = engine.submit(request(12, 12), Duration::from_millis(1));
    next(&mut engine);
    assert!(is_waiting(&engine, detached) && !is_waiting(&engine, small));
}

/// The first step, of `num_steps`, in which `wanted` is admitted while `add` goes on adding requests.
fn admitted_at(
    engine: &mut Engine<FakeRunner>,
    wanted: RequestId,
    num_steps: u64,
    mut add: impl FnMut(&mut Engine<FakeRunner>, Duration),
) -> Option<u64> {
    (1..num_steps).find(|&step| {
        let now = Duration::from_millis(10 * step);
        add(engine, now);
        engine.step(now, usize::MAX);
        engine.scheduler().check().unwrap();
        engine.admitted().iter().any(|(id, _)| *id == wanted)
    })
}

/// Requests of the best priority arrive faster than they can be served, for ever.
#[test]
fn the_best_priority_does_not_starve_the_worst() {
    let config = EngineConfig { max_num_seqs: 2, max_model_len: 64, ..Default::default() };
    let mut engine = Engine::new(FakeRunner::hashing(VOCAB_SIZE, 8, 16), config, VOCAB_SIZE);
    let best = Request { priority: -100, ..request(8, 10) };
    for _ in 0..20 {
        engine.submit(best.clone(), Duration::ZERO);
    }
    engine.submit(Request { priority: 100, ..request(8, 10) }, Duration::ZERO);
    let step = admitted_at(&mut engine, RequestId(20), 3_000, |engine, now| {
        engine.submit(best.clone(), now);
    });
    // Every eighth admission goes by deadline, five steps an admission: the third of them at the latest.
    assert!(step.is_some_and(|step| step <= 160), "admitted at step {step:?}");
}

/// A flood keeps its tenant's queue full. Whoever comes with one request is next.
#[test]
fn a_flood_of_one_tenant_does_not_delay_another() {
    let config =
        EngineConfig { max_num_seqs: 2, max_model_len: 64, tenant_weights: vec![1, 1], ..Default::default() };
    let mut engine = Engine::new(FakeRunner::hashing(VOCAB_SIZE, 8, 16), config, VOCAB_SIZE);
    for _ in 0..200 {
        engine.submit(request(8, 10), Duration::ZERO);
    }
    engine.step(Duration::ZERO, usize::MAX);
    engine.submit(Request { tenant: TenantId(1), ..request(8, 10) }, Duration::ZERO);
    let step = admitted_at(&mut engine, RequestId(200), 100, |engine, now| {
        engine.submit(request(8, 10), now);
    });
    // As soon as one of the two that run has ended.
    assert!(step.is_some_and(|step| step <= 11), "admitted at step {step:?}");
}
