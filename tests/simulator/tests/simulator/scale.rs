//! Owns the long run: requests of several tenants in virtual time, more of them than the machine can
//! serve, with bounded memory, nobody starving and every invariant intact.
//!
//! `GLMSERVE_SIM_REQUESTS=1000000 cargo test --release -p glm-simulator --test simulator scale --
//! --nocapture` (`make bench-scale`) runs a million.

use std::time::Duration;

use glm_engine::StepWork;
use glm_engine::{
    AdmissionReport, Engine, EngineConfig, Request, RequestId, SamplingParams, TenantId, TokenEvent,
};
use glm_simulator::machine::{Machine, Speed, VOCAB_SIZE};
use glm_simulator::rng::Rng;

const SPEED: Speed = Speed { step: 0.004, prefill: 1e-4, decode: 2e-4, pair: 1e-8 };
const TARGET: Duration = Duration::from_millis(100);
const BLOCK_SIZE: usize = 16;
/// Most requests of the flood, and of each other tenant, that run or wait.
const MAX_FLOOD: usize = 2_000;
const MAX_OTHER: usize = 100;
const NUM_TENANTS: usize = 8;

#[derive(Debug, Default)]
struct Tenant {
    num_in_engine: usize,
    num_ended: usize,
    num_refused: usize,
    longest_wait: Duration,
}

/// Bytes of this process in memory, where Linux tells.
fn resident_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(text.split_whitespace().nth(1)?.parse::<usize>().ok()? * 4096)
}

fn random_request(rng: &mut Rng, tenant: usize) -> Request {
    // One of a few system prompts, then something of the user's own.
    let system = rng.range(0..=3) as u32;
    let mut prompt_token_ids: Vec<u32> = (0..64).map(|i| (system + i) % 7).collect();
    let num_own = if rng.one_in(50) { rng.range(500..=2_000) } else { rng.range(1..=60) };
    prompt_token_ids.extend((0..num_own).map(|_| rng.range(0..=7) as u32));
    let max_tokens = rng.range(1..=24);
    Request {
        prompt_token_ids,
        sampling: SamplingParams { temperature: 0.0, max_tokens, ignore_eos: true, ..Default::default() },
        deadline: rng.one_in(4).then(|| Duration::from_millis(rng.range(100..=30_000) as u64)),
        tenant: TenantId(tenant as u32),
        priority: rng.range(0..=2) as i32 - 1,
        ..Request::default()
    }
}

#[test]
fn scale() {
    let num_requests =
        std::env::var("GLMSERVE_SIM_REQUESTS").map_or(100_000, |n| n.parse().expect("a number"));
    let config = EngineConfig {
        max_num_seqs: 32,
        max_num_waiting: MAX_FLOOD + NUM_TENANTS * MAX_OTHER,
        tenant_weights: vec![1; NUM_TENANTS],
        target_inter_token_latency: TARGET,
        ..Default::default()
    };
    let mut engine = Engine::new(Machine::new(1_500, BLOCK_SIZE), config, VOCAB_SIZE);
    let mut rng = Rng::new(1);
    let mut tenants: [Tenant; NUM_TENANTS] = Default::default();
    let mut owners = std::collections::HashMap::new();
    let (mut now, mut next_id, mut num_steps) = (Duration::ZERO, 0, 0u64);
    let (mut longest_step, mut num_cached, mut num_queried) = (Duration::ZERO, 0, 0);
    let mut memory_at_a_tenth = None;
    while next_id < num_requests || !engine.is_idle() {
        // The flood asks for all there is; of the others one comes now and then, for less than its share.
        for (tenant, of) in tenants.iter_mut().enumerate() {
            let num_new = if tenant == 0 { 4 } else { usize::from(rng.one_in(20)) };
            for _ in 0..num_new {
                if next_id == num_requests {
                    break;
                }
                if of.num_in_engine == if tenant == 0 { MAX_FLOOD } else { MAX_OTHER } {
                    of.num_refused += 1;
                    continue;
                }
                of.num_in_engine += 1;
                owners.insert(RequestId(next_id), tenant);
                engine.submit(random_request(&mut rng, tenant), now);
                next_id += 1;
            }
        }
        if rng.one_in(50) && next_id > 0 {
            let id = RequestId(next_id - 1 - rng.range(0..=next_id.min(500) as usize - 1) as u64);
            if let Some(tenant) = owners.remove(&id) {
                engine.abort(id);
                tenants[tenant].num_in_engine -= 1;
                tenants[tenant].num_ended += 1;
            }
        }
        let has_replies = engine.scheduler().decodes().num_decodes > 0;
        engine.plan(now);
        engine.run();
        for (id, AdmissionReport { queue_time, num_queried_tokens, num_cached_tokens, .. }) in
            engine.admitted()
        {
            let of = &mut tenants[owners[id]];
            of.longest_wait = of.longest_wait.max(*queue_time);
            num_queried += num_queried_tokens;
            num_cached += num_cached_tokens;
        }
        for (id, event) in engine.events() {
            assert!(!matches!(event, TokenEvent::Failed(_)), "{id:?}: {event:?}");
            if event.is_terminal() {
                let tenant = owners.remove(id).expect("it ends once");
                tenants[tenant].num_in_engine -= 1;
                tenants[tenant].num_ended += 1;
            }
        }
        let work = StepWork::of(engine.step_plan());
        let time = SPEED.time(&work);
        let report = engine.finish(time);
        assert!(report.num_scheduled_tokens > 0 || engine.is_idle(), "step {num_steps} does nothing");
        if has_replies && num_steps > 500 {
            longest_step = longest_step.max(time);
        }
        now += time;
        num_steps += 1;
        if num_steps % 1_000 == 0 {
            engine.scheduler().check().unwrap_or_else(|broken| panic!("step {num_steps}: {broken}"));
        }
        if memory_at_a_tenth.is_none() && next_id > num_requests / 10 {
            memory_at_a_tenth = resident_bytes();
        }
    }
    engine.scheduler().check().unwrap();
    let growth = resident_bytes().zip(memory_at_a_tenth).map(|(end, tenth)| end.saturating_sub(tenth));
    println!(
        "{num_requests} requests in {num_steps} steps and {:.0} s of virtual time: longest step beside replies \
         {longest_step:?}, {:.0} % of prompt tokens cached, memory grew by {growth:?} bytes after the first tenth",
        now.as_secs_f64(),
        100.0 * num_cached as f64 / num_queried as f64
    );
    tenants.iter().for_each(|tenant| println!("{tenant:?}"));
    assert_eq!(tenants.iter().map(|tenant| tenant.num_ended as u64).sum::<u64>(), num_requests);
    assert!(owners.is_empty());
    assert!(growth.is_none_or(|bytes| bytes < 16 << 20), "memory grows: {growth:?} bytes");
    assert!(longest_step < TARGET.mul_f64(1.2), "{longest_step:?} beside replies");
    // The flood waits for itself. Every other tenant asks for less than its share and is served at once.
    let [flood, others @ ..] = &tenants;
    assert!(flood.num_refused > 0 && flood.longest_wait > Duration::from_secs(10), "{flood:?}: no flood");
    let longest_wait = others.iter().map(|tenant| tenant.longest_wait).max().expect("there are others");
    assert!(longest_wait < flood.longest_wait / 4, "{longest_wait:?} beside {flood:?}");
}
