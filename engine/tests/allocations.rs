//! The engine's loop over the fake runner: a step of decodes allocates nothing, whatever the sequences.

use std::time::Duration;

use counting_allocator::num_allocations;
use glm_engine::StepBudget;
use glm_engine::runner::fake::FakeRunner;
use glm_engine::{Engine, EngineConfig, Request, SamplingParams};

const NUM_SEQUENCES: u64 = 16;
const BLOCK_SIZE: usize = 16;

#[test]
fn a_step_of_decodes_allocates_nothing() {
    let config =
        EngineConfig { max_num_seqs: NUM_SEQUENCES as usize, max_model_len: 512, ..Default::default() };
    let mut engine = Engine::new(FakeRunner::hashing(96, 512, BLOCK_SIZE), config, 96);
    for id in 0..NUM_SEQUENCES {
        let sampling = SamplingParams {
            temperature: if id % 2 == 0 { 0.0 } else { 0.8 },
            top_p: 0.8,
            max_tokens: 200,
            ignore_eos: true,
            ..Default::default()
        };
        let request = Request { prompt_token_ids: vec![1; 20 + id as usize], sampling, ..Request::default() };
        engine.submit(request, Duration::ZERO);
    }
    let mut num_steps = 0;
    let mut step = || {
        num_steps += 1;
        engine.step(Duration::from_millis(num_steps), 512);
        engine.step_plan().num_tokens()
    };
    // Prompts, and buffers that double until a step fits.
    for _ in 0..20 {
        step();
    }
    let counts: Vec<u64> = (0..100)
        .map(|_| {
            let mut num_tokens = 0;
            let count = num_allocations(|| num_tokens = step());
            assert_eq!(num_tokens as u64, NUM_SEQUENCES);
            count
        })
        .collect();
    // Each sequence takes several blocks more, so that the plan's block table and the double's history double.
    assert!(counts.iter().sum::<u64>() <= 4, "{counts:?}");
}

#[test]
fn a_step_with_drafts_allocates_nothing() {
    let config = EngineConfig { max_model_len: 512, ..Default::default() };
    let mut engine = Engine::new(FakeRunner::repeating(96, 64, BLOCK_SIZE), config, 96);
    let budget = StepBudget { prefill: 512.into(), draft_price: 0.1 };
    // The first one makes all buffers as large as the second one needs them.
    for id in 0..2 {
        let sampling =
            SamplingParams { temperature: 0.0, max_tokens: 400, ignore_eos: true, ..Default::default() };
        let request = Request { prompt_token_ids: vec![1; 20], sampling, ..Request::default() };
        engine.submit(request, Duration::ZERO);
        engine.step(Duration::ZERO, budget);
        let (mut num_drafted, mut num_allocated) = (0, 0);
        while !engine.is_idle() {
            num_allocated +=
                num_allocations(|| num_drafted += engine.step(Duration::ZERO, budget).num_draft_tokens);
        }
        assert!(num_drafted > 50, "{num_drafted} drafts");
        assert!(id == 0 || num_allocated == 0, "{num_allocated} allocations");
    }
}
