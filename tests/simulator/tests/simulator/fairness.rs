//! Owns the proof of fair shares: while two tenants wait, neither gets more than its share, but for a
//! bounded difference, however much more it asks for.

use std::time::Duration;

use glm_engine::StepBudget;
use glm_engine::runner::fake::FakeRunner;
use glm_engine::{Engine, EngineConfig, RequestId, TenantId, TokenEvent};
use glm_simulator::rng::Rng;

use crate::VOCAB_SIZE;
use crate::starvation::request;

const MAX_NUM_SEQS: usize = 4;
const MAX_PROMPT: usize = 24;
const MAX_OUTPUT: usize = 12;
const WEIGHTS: [u32; 3] = [1, 1, 2];

/// What tenants were served, counted from events: an output token costs as much as two of a prompt.
#[derive(Default)]
struct Ledger {
    tenants: Vec<usize>,
    prompts: Vec<usize>,
    served: [f64; 3],
}

impl Ledger {
    fn add(&mut self, tenant: usize, num_prompt_tokens: usize) -> RequestId {
        self.tenants.push(tenant);
        self.prompts.push(num_prompt_tokens);
        RequestId(self.tenants.len() as u64 - 1)
    }

    fn event(&mut self, id: RequestId, event: &TokenEvent) {
        let index = id.0 as usize;
        let tenant = self.tenants[index];
        let cost = match event {
            TokenEvent::Admitted { num_cached_tokens } => self.prompts[index] - num_cached_tokens,
            TokenEvent::Token { .. } => 2,
            _ => 0,
        };
        self.served[tenant] += cost as f64 / f64::from(WEIGHTS[tenant]);
    }
}

/// The first tenant floods, the others come and go at random.
fn simulate(seed: u64) {
    let mut rng = Rng::new(seed);
    let config = EngineConfig {
        max_num_seqs: MAX_NUM_SEQS,
        max_num_batched_tokens: 32,
        max_model_len: MAX_PROMPT + MAX_OUTPUT,
        tenant_weights: WEIGHTS.to_vec(),
        ..Default::default()
    };
    // Replies repeat themselves, so that some come several tokens a step.
    let last = |history: &[u32]| Ok(history[history.len() - 1]);
    let runner = FakeRunner::scripted(VOCAB_SIZE, 10, 16, Box::new(last));
    let mut engine = Engine::new(runner, config, VOCAB_SIZE);
    let budget = StepBudget { prefill: usize::MAX.into(), draft_price: 0.1 };
    let mut ledger = Ledger::default();
    // Sheng et al. 2024, theorem 4.4: twice the larger of one prompt and what the running set may still
    // generate. Here the last token of each request is charged late, or never: once more a running set.
    let running_set = 2 * MAX_NUM_SEQS * MAX_OUTPUT;
    let bound = (2 * running_set.max(MAX_PROMPT) + 2 * MAX_NUM_SEQS) as f64;
    // Of each pair that waits, the difference when both began to.
    let mut since = [[None; 3]; 3];
    let (mut wants, mut num_steps_together, mut num_comes) = ([true, false, false], 0, 0);
    let mut num_drafted = 0;
    for step in 0..4_000u64 {
        let now = Duration::from_millis(step);
        for (tenant, wants) in wants.iter_mut().enumerate() {
            *wants ^= tenant > 0 && rng.one_in(300);
            let most = if tenant == 0 { 20 } else { 2 };
            let num_waiting = engine
                .scheduler()
                .waiting()
                .iter()
                .filter(|s| s.tenant.0 as usize == tenant && s.admission.is_none())
                .count();
            for _ in num_waiting..if *wants { most } else { 0 } {
                let mut request = request(rng.range(1..=MAX_PROMPT), rng.range(1..=MAX_OUTPUT));
                request.prompt_token_ids.iter_mut().for_each(|id| *id = rng.range(0..=90) as u32);
                request.tenant = TenantId(tenant as u32);
                ledger.add(tenant, request.prompt_token_ids.len());
                engine.submit(request, now);
            }
        }
        num_drafted += engine.step(now, budget).num_accepted_draft_tokens;
        engine.scheduler().check().unwrap_or_else(|broken| panic!("seed {seed}, step {step}: {broken}"));
        engine.events().iter().for_each(|(id, event)| ledger.event(*id, event));
        let waits = |tenant| {
            engine.scheduler().waiting().iter().any(|s| s.tenant == TenantId(tenant) && s.admission.is_none())
        };
        let waiting = [0, 1, 2].map(waits);
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            let difference = ledger.served[a] - ledger.served[b];
            if !(waiting[a] && waiting[b]) {
                since[a][b] = None;
                continue;
            }
            let base = *since[a][b].get_or_insert_with(|| {
                num_comes += 1;
                difference
            });
            num_steps_together += 1;
            let drift = (difference - base).abs();
            assert!(
                drift <= bound,
                "seed {seed}, step {step}: tenants {a} and {b} drift by {drift} of {bound}"
            );
        }
    }
    assert!(num_drafted > 500, "seed {seed}: {num_drafted} accepted drafts");
    // Far more was served than the bound allows for.
    assert!(num_steps_together > 2_000 && num_comes > 5, "seed {seed}: {num_steps_together}, {num_comes}");
    assert!(ledger.served.iter().all(|&served| served > 10.0 * bound), "seed {seed}: {:?}", ledger.served);
}

#[test]
fn shares_are_fair_while_tenants_wait() {
    (0..20).for_each(simulate);
}
