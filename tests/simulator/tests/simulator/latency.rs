//! Owns the proof that neither prompts nor drafts stall running replies, on machines in virtual time.

use std::collections::BTreeMap;
use std::time::Duration;

use glm_engine::StepWork;
use glm_engine::{Engine, EngineConfig, PrefixCaching, Request, TokenEvent};
use glm_simulator::machine::{Machine, Speed, VOCAB_SIZE};

use crate::starvation::request;

const BLOCK_SIZE: usize = 16;
const TARGET: Duration = Duration::from_millis(250);
/// The model of a machine is learnt, not known.
const TOLERANCE: f64 = 1.05;

/// Seconds of the longest pauses between two tokens of a reply, and tokens of the largest step.
#[derive(Debug, Default)]
struct Seen {
    longest_pause: f64,
    largest_step: usize,
    /// Of the steps after the last reply ended.
    largest_lonely_step: usize,
    num_prompts: usize,
    num_drafts: usize,
}

/// Four replies run on while prompts of up to `longest_prompt` tokens come, one after the other; then
/// prompts alone. The replies repeat themselves; `max_num_draft_tokens` of them are drafted.
fn serve(speed: Speed, longest_prompt: usize, max_num_draft_tokens: usize) -> Seen {
    let config = EngineConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 2048,
        // Every prompt is to be computed.
        prefix_caching: PrefixCaching::Off,
        max_num_draft_tokens,
        max_step_time: Duration::from_secs(1),
        target_inter_token_latency: TARGET,
        ..Default::default()
    };
    let mut engine = Engine::new(Machine::new(4096, BLOCK_SIZE), config, VOCAB_SIZE);
    let mut seen = Seen::default();
    let mut last_token_at = BTreeMap::new();
    for _ in 0..4 {
        engine.submit(request(64, 4000), Duration::ZERO);
    }
    let (mut now, mut next_id) = (Duration::ZERO, 4);
    for step in 0..6_000 {
        let num_replies =
            engine.scheduler().running().iter().filter(|running| running.sequence.id.0 < 4).count();
        if engine.scheduler().num_waiting() == 0
            && engine.scheduler().running().len() == num_replies
            && step % 40 > 20
        {
            let num_tokens = [100, longest_prompt / 4, longest_prompt][next_id as usize % 3];
            let prompt_token_ids = (0..num_tokens).map(|i| (next_id as u32 + i as u32) % 7).collect();
            engine.submit(Request { prompt_token_ids, ..request(1, 1) }, now);
            next_id += 1;
        }
        if engine.is_idle() {
            continue;
        }
        engine.plan(now);
        engine.run();
        let work = StepWork::of(engine.step_plan());
        let time = speed.time(&work);
        now += time;
        seen.num_drafts += engine.finish(time).num_draft_tokens;
        // The machine is not known at first.
        if step > 200 {
            let largest =
                if num_replies > 0 { &mut seen.largest_step } else { &mut seen.largest_lonely_step };
            *largest = work.num_prefill_tokens.max(*largest);
        }
        for (id, _) in engine.events().iter().filter(|(_, event)| matches!(event, TokenEvent::Token { .. })) {
            let before = last_token_at.insert(*id, now);
            if let Some(before) = before.filter(|_| step > 200) {
                seen.longest_pause = seen.longest_pause.max((now - before).as_secs_f64());
            }
        }
    }
    seen.num_prompts = next_id as usize - 4;
    seen
}

#[test]
fn prompts_and_drafts_keep_pauses_below_the_target() {
    let speeds = [
        ("a small model", Speed { step: 0.005, prefill: 2e-4, decode: 5e-4, pair: 2e-8 }),
        ("a large one", Speed { step: 0.1, prefill: 4e-3, decode: 5e-3, pair: 3e-7 }),
        ("one with slow attention", Speed { step: 0.02, prefill: 1e-3, decode: 1e-3, pair: 1e-6 }),
    ];
    for ((name, speed), num_drafts) in speeds.into_iter().flat_map(|speed| [(speed, 0), (speed, 8)]) {
        let seen = serve(speed, 8_000, num_drafts);
        let block =
            StepWork { num_prefill_tokens: BLOCK_SIZE, num_decodes: 0, num_pairs: BLOCK_SIZE * 8_000 };
        let block = speed.time(&block).as_secs_f64() - speed.step;
        let limit = TARGET.as_secs_f64() * TOLERANCE + block;
        println!("{name}, {num_drafts} drafts: {seen:?}, limit {limit:.3} s");
        assert!(seen.longest_pause <= limit, "{name}: {seen:?}, limit {limit} s");
        // The target is used, and nothing holds prompts back when nobody waits for a token.
        assert!(seen.longest_pause > 0.8 * TARGET.as_secs_f64(), "{name}: {seen:?}");
        assert!(seen.largest_lonely_step > 2 * seen.largest_step.min(1000), "{name}: {seen:?}");
        assert!(seen.num_prompts > 20, "{name}: {seen:?}");
        assert!((seen.num_drafts > 200) == (num_drafts > 0), "{name}: {seen:?}");
    }
}
