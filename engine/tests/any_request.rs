//! Whatever a request says, the engine's thread lives, and each accepted request ends exactly once.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use glm_engine::runner::fake::FakeRunner;
use glm_engine::{
    EngineConfig, EngineThread, EventReceiver, NoObserver, Request, SamplingParams, TenantId, TokenEvent,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const VOCAB_SIZE: usize = 32;
const MAX_MODEL_LEN: usize = 96;
const NUM_CASES: u32 = 400;

/// Mostly in range, so that what is odd in one field is seen behind the others, too.
fn float(low: f32, high: f32) -> impl Strategy<Value = f32> {
    prop_oneof![
        30 => low..=high,
        2 => Just(low),
        2 => Just(high),
        1 => proptest::num::f32::ANY,
        1 => prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(f32::MIN_POSITIVE)],
    ]
}

fn token() -> impl Strategy<Value = u32> {
    prop_oneof![200 => 0..VOCAB_SIZE as u32, 1 => Just(VOCAB_SIZE as u32), 1 => any::<u32>()]
}

fn count(usual: std::ops::Range<usize>) -> impl Strategy<Value = usize> {
    prop_oneof![20 => usual, 1 => Just(0), 1 => Just(usize::MAX), 1 => any::<usize>()]
}

#[allow(clippy::needless_update, reason = "options that come later keep their defaults here")]
fn sampling() -> impl Strategy<Value = SamplingParams> {
    let choice = (
        prop_oneof![1 => Just(0.0), 3 => float(0.0, 2.0)],
        prop_oneof![0..40u32, any::<u32>()],
        float(0.01, 1.0),
        any::<u64>(),
    );
    let penalties = (
        prop_oneof![2 => Just(1.0), 1 => float(0.01, 10.0)],
        prop_oneof![2 => Just(0.0), 1 => float(-2.0, 2.0)],
        prop_oneof![2 => Just(0.0), 1 => float(-2.0, 2.0)],
        prop_oneof![6 => vec((token(), float(-100.0, 100.0)), 0..4), 1 => vec((0..32u32, -1.0..1.0f32), 1020..1030)],
    );
    let end = (
        count(1..60),
        prop_oneof![2 => Just(0), 1 => count(0..20)],
        any::<bool>(),
        prop_oneof![
            20 => vec(token(), 0..4),
            // All tokens but one, all tokens, and too many.
            1 => Just((1..VOCAB_SIZE as u32).collect()),
            1 => Just((0..VOCAB_SIZE as u32).collect()),
            1 => vec(0..VOCAB_SIZE as u32, 1020..1030),
        ],
    );
    (choice, penalties, end).prop_map(|(choice, penalties, end)| SamplingParams {
        temperature: choice.0,
        top_k: choice.1,
        top_p: choice.2,
        seed: choice.3,
        repetition_penalty: penalties.0,
        presence_penalty: penalties.1,
        frequency_penalty: penalties.2,
        logit_bias: penalties.3,
        max_tokens: end.0,
        min_tokens: end.1,
        ignore_eos: end.2,
        stop_token_ids: end.3,
        ..SamplingParams::default()
    })
}

/// A request, whether it is a probe, and whether its reader leaves it alone.
#[allow(clippy::needless_update, reason = "as above")]
fn request() -> impl Strategy<Value = (Request, bool, bool)> {
    let duration = prop_oneof![
        Just(Duration::ZERO),
        Just(Duration::MAX),
        (0..10_000u64).prop_map(Duration::from_millis),
        any::<u64>().prop_map(Duration::from_secs),
    ];
    let prompt =
        prop_oneof![30 => vec(token(), 1..40), 1 => vec(token(), 0..300), 1 => Just(vec![1; 100_000])];
    let tenant = prop_oneof![20 => 0..2u32, 1 => any::<u32>()];
    let priority = prop_oneof![20 => -100..=100, 1 => any::<i32>()];
    let deadline = prop_oneof![2 => Just(None), 1 => duration.prop_map(Some)];
    (prompt, sampling(), deadline, tenant, priority, any::<bool>(), any::<bool>()).prop_map(
        |(prompt_token_ids, sampling, deadline, tenant, priority, is_probe, is_detached)| {
            let tenant = TenantId(tenant);
            let request =
                Request { prompt_token_ids, sampling, deadline, tenant, priority, ..Request::default() };
            (request, is_probe, is_detached)
        },
    )
}

/// Reads to the end; returns how many terminal events there were.
async fn num_ends(events: &mut EventReceiver) -> usize {
    let mut num_ends = 0;
    while let Some(event) = events.recv().await {
        let is_failed = matches!(event, TokenEvent::Failed(_));
        assert!(!is_failed, "nothing of a request that was accepted can fail here: {event:?}");
        num_ends += usize::from(event.is_terminal());
    }
    num_ends
}

#[test]
fn the_thread_lives_and_each_accepted_request_ends_once() {
    let config = EngineConfig {
        max_num_seqs: 4,
        max_num_waiting: 4,
        max_num_batched_tokens: 48,
        max_model_len: MAX_MODEL_LEN,
        tenant_weights: vec![1, 3],
        ..EngineConfig::default()
    };
    let runner = FakeRunner::repeating(VOCAB_SIZE, 12, 16);
    let (handle, _thread) = EngineThread::spawn(runner, config, VOCAB_SIZE, Arc::new(NoObserver)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (num_accepted, num_refused) = (Cell::new(0), Cell::new(0));
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let config = Config { cases: NUM_CASES, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new_with_rng(config, rng).run(&vec(request(), 1..10), |requests| {
        let mut receivers = Vec::new();
        for (request, is_probe, is_detached) in requests {
            let submitted = if is_probe { handle.submit_probe(request) } else { handle.submit(request) };
            match submitted {
                Ok(events) => {
                    events.set_detached(is_detached);
                    receivers.push(events);
                }
                Err(_) => num_refused.set(num_refused.get() + 1),
            }
        }
        num_accepted.set(num_accepted.get() + receivers.len());
        for events in &mut receivers {
            prop_assert_eq!(runtime.block_on(num_ends(events)), 1);
        }
        prop_assert!(handle.status().alive);
        Ok(())
    });
    result.unwrap();
    // Requests were accepted and refused.
    let (num_accepted, num_refused) = (num_accepted.get(), num_refused.get());
    println!("{num_accepted} were accepted, {num_refused} refused");
    assert!(num_accepted > 200 && num_refused > 200, "{num_accepted} were accepted, {num_refused} refused");
}
