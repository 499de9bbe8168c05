//! Owns the loop's body: schedule a step ([`Engine::plan_step`]), run it and apply its outcome
//! ([`Engine::run_step`]).
//!
//! Invariant: counters move only after a run succeeded. If it fails, its sequences end with an
//! error, every other one is untouched. Must not know clocks, threads or channels.

use std::sync::Arc;
use std::time::Duration;

use crate::config::EngineConfig;
use crate::cost_model::{PrefillBudget, StepWork};
use crate::error::{LoadError, SequenceError};
use crate::kv_cache::CachedPrefixes;
use crate::observer::{AdmissionReport, EngineGauges, StepReport};
use crate::request::{FinishReason, Request, RequestId, TenantId, TokenEvent};
use crate::runner::ModelRunner;
use crate::sampler::Sampler;
use crate::scheduler::{ScheduleOutcome, Scheduler};
use crate::sequence::{RunningSequence, Sequence};
use crate::step::{StepOutput, StepPlan};

/// Scheduler, runner and sampler, and the buffers between them.
#[derive(Debug)]
pub struct Engine<R> {
    scheduler: Scheduler,
    runner: R,
    sampler: Sampler,
    plan: StepPlan,
    outcome: ScheduleOutcome,
    events: Vec<(RequestId, TokenEvent)>,
}

impl<R: ModelRunner> Engine<R> {
    /// An idle engine. `config.max_model_len` must fit the model and the runner's cache.
    pub fn new(runner: R, config: EngineConfig, vocab_size: usize) -> Self {
        let cache = runner.kv_cache();
        Self {
            scheduler: Scheduler::new(config, cache.num_blocks, cache.block_size),
            sampler: Sampler::new(vocab_size),
            plan: StepPlan::default(),
            outcome: ScheduleOutcome::default(),
            events: Vec::new(),
            runner,
        }
    }

    /// As [`ModelRunner::prepare`], for as many sequences as may run.
    ///
    /// # Errors
    /// As there.
    pub fn prepare(&mut self, max_num_seqs: usize) -> Result<(), LoadError> {
        self.runner.prepare(max_num_seqs)
    }

    /// Queues a request that was submitted at `arrival`; `id` must be larger than all before it and
    /// the request must fit.
    pub fn add(&mut self, id: RequestId, request: Request, arrival: Duration) {
        self.scheduler.add(Sequence::new(id, request, arrival));
    }

    /// Like [`Engine::add`], before all others and beside as many as may run. One at a time.
    pub fn add_probe(&mut self, id: RequestId, request: Request, arrival: Duration) {
        let mut sequence = Sequence::new(id, request, arrival);
        sequence.is_probe = true;
        self.scheduler.add(sequence);
    }

    /// Says whether anybody reads a request: if not, it is preempted before the others.
    pub fn set_detached(&mut self, id: RequestId, is_detached: bool) {
        self.scheduler.set_detached(id, is_detached);
    }

    /// Says what a row that checks a guess must be worth, from now on: the least chance that it yields
    /// a token. At first it is 1, and nothing is guessed.
    pub fn set_draft_price(&mut self, price: f64) {
        self.scheduler.set_draft_price(price);
    }

    /// What other threads may know of the prefix cache.
    pub fn cached_prefixes(&self) -> &Arc<CachedPrefixes> {
        self.scheduler.cached_prefixes()
    }

    /// Sequences in the queue.
    pub fn num_waiting(&self) -> usize {
        self.scheduler.num_waiting()
    }

    /// The queue in the order that can be foreseen, the next one first.
    pub fn waiting(&self) -> Vec<&Sequence> {
        self.scheduler.waiting()
    }

    /// What a tenant was served, in thousandths of an input token and divided by its weight.
    pub fn service(&self, tenant: TenantId) -> u64 {
        self.scheduler.service(tenant)
    }

    /// The running sequences; the last is preempted first.
    pub fn running(&self) -> &[RunningSequence] {
        self.scheduler.running()
    }

    /// The work of the running sequences that lack one token only.
    pub fn decodes(&self) -> StepWork {
        self.scheduler.decodes()
    }

    /// How many requests could be admitted without the end of another one.
    pub fn num_free_slots(&self) -> usize {
        self.scheduler.num_free_slots()
    }

    /// Whether the queue changed since the last call.
    pub fn take_queue_changed(&mut self) -> bool {
        self.scheduler.take_queue_changed()
    }

    /// Forgets a request and frees its blocks; no event follows.
    pub fn abort(&mut self, id: RequestId) {
        self.scheduler.remove(id);
    }

    /// Whether a step would do nothing.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Figures of the current state.
    pub fn gauges(&self) -> EngineGauges {
        self.scheduler.gauges()
    }

    /// Events since the last step was planned, in order.
    pub fn events(&self) -> &[(RequestId, TokenEvent)] {
        &self.events
    }

    /// The requests that the last step admitted for the first time.
    pub fn admitted(&self) -> &[(RequestId, AdmissionReport)] {
        &self.outcome.admitted
    }

    /// The plan of the last step.
    pub fn plan(&self) -> &StepPlan {
        &self.plan
    }

    /// Checks the scheduler's invariants; for tests and simulations.
    ///
    /// # Errors
    /// Says which is broken.
    pub fn check(&self) -> Result<(), String> {
        self.scheduler.check()
    }

    /// Plans and runs a step of at most `prefill_budget` of prompts, or one block.
    pub fn step(&mut self, now: Duration, prefill_budget: impl Into<PrefillBudget>) -> StepReport {
        self.plan_step(now, prefill_budget);
        self.run_step()
    }

    /// Plans the next step, of at most `prefill_budget` of prompts, or one block.
    pub fn plan_step(&mut self, now: Duration, prefill_budget: impl Into<PrefillBudget>) {
        self.events.clear();
        self.scheduler.schedule(now, prefill_budget.into(), &mut self.plan, &mut self.outcome);
        self.events.extend(
            self.outcome.admitted.iter().map(|(id, report)| {
                (*id, TokenEvent::Admitted { num_cached_tokens: report.num_cached_tokens })
            }),
        );
    }

    /// Runs the planned step. The report's duration is left to whoever owns the clock.
    pub fn run_step(&mut self) -> StepReport {
        let mut report = StepReport {
            duration: Duration::ZERO,
            num_scheduled_tokens: self.plan.num_tokens(),
            num_prompt_tokens: 0,
            num_generated_tokens: 0,
            num_draft_tokens: 0,
            num_accepted_draft_tokens: 0,
            num_preemptions: self.outcome.num_preemptions,
            num_non_finite: 0,
            failed: false,
            lost_device: false,
            serves_users: !self.plan.sequences.iter().all(|scheduled| self.scheduler.is_probe(scheduled.id)),
        };
        if self.plan.is_empty() {
            return report;
        }
        let mut output = match self.runner.run(&self.plan) {
            Ok(output) => output,
            Err(error) => {
                (report.failed, report.lost_device) = (true, error.is_permanent);
                for scheduled in &self.plan.sequences {
                    self.scheduler.remove(scheduled.id);
                    self.events.push((scheduled.id, TokenEvent::Failed(error.clone().into())));
                }
                return report;
            }
        };
        for (index, scheduled) in self.plan.sequences.iter().enumerate() {
            let num_known_tokens = scheduled.num_known_tokens();
            let Some(sequence) = self.scheduler.commit(scheduled.id, num_known_tokens) else {
                continue;
            };
            let end = scheduled.num_computed_tokens + num_known_tokens;
            let is_users = !sequence.is_probe;
            if is_users {
                report.num_prompt_tokens += report_prompt_tokens(sequence, end);
            }
            let drafts = self.plan.drafts(index);
            let mut num_accepted = 0;
            let mut is_finished = false;
            // The next row is of use only if the token was the one that it was computed for.
            for row in scheduled.logits_rows() {
                let token_id = sample(&mut self.sampler, &mut output, row, sequence);
                is_finished = apply_token(token_id, sequence, &mut self.events);
                report.num_generated_tokens += usize::from(is_users);
                let draft = drafts.get(row - scheduled.logits_row);
                if is_finished || draft.is_none_or(|&draft| sequence.tokens().last() != Some(&(draft as u32)))
                {
                    break;
                }
                num_accepted += 1;
            }
            if is_users {
                report.num_draft_tokens += drafts.len();
                report.num_accepted_draft_tokens += num_accepted;
            }
            if !drafts.is_empty() {
                // Of a sequence that ends, too: its tenant is charged, and others may use its blocks.
                self.scheduler.commit_drafts(scheduled.id, num_accepted);
            }
            if is_finished {
                if let Some((_, TokenEvent::Failed(error))) = self.events.last() {
                    report.num_non_finite +=
                        usize::from(matches!(error, SequenceError::NonFiniteLogits { .. }));
                    // The rows could not be copied: what the device computed may have failed, too.
                    report.failed |= matches!(error, SequenceError::Run(_) | SequenceError::DeviceLost(_));
                    report.lost_device |= matches!(error, SequenceError::DeviceLost(_));
                    if !matches!(error, SequenceError::CannotSample(_)) {
                        // What a machine in doubt has computed is not served to others.
                        self.scheduler.forget_cached();
                    }
                }
                self.scheduler.remove(scheduled.id);
            }
        }
        report
    }
}

/// Counts the prompt tokens below `end` that were not counted before.
fn report_prompt_tokens(sequence: &mut Sequence, end: usize) -> usize {
    let end = end.min(sequence.num_prompt_tokens());
    let num_new = end.saturating_sub(sequence.num_reported_prompt_tokens);
    sequence.num_reported_prompt_tokens += num_new;
    num_new
}

/// The sequence's next token: from the row's candidates, or from the whole row where they don't do.
fn sample(
    sampler: &mut Sampler,
    output: &mut StepOutput<'_>,
    row: usize,
    sequence: &Sequence,
) -> Result<u32, SequenceError> {
    let candidates = output.candidates.and_then(|candidates| candidates.row(row));
    if let Some(found) = candidates.and_then(|row| sampler.sample_candidates(row, sequence)) {
        return found;
    }
    let rows = output.logits.rows()?;
    if row >= rows.nrows() {
        return Err(SequenceError::Run(format!("{} rows were computed, row {row} is missing", rows.nrows())));
    }
    let row = rows.row(row).to_slice();
    sampler.sample(row.ok_or_else(|| SequenceError::Run("logits are not contiguous".into()))?, sequence)
}

/// Appends and reports the token; true if that ended the sequence.
fn apply_token(
    token_id: Result<u32, SequenceError>,
    sequence: &mut Sequence,
    events: &mut Vec<(RequestId, TokenEvent)>,
) -> bool {
    let token_id = match token_id {
        Ok(token_id) => token_id,
        Err(error) => return fail(sequence.id, error, events),
    };
    sequence.push(token_id);
    let params = &sequence.sampling;
    let num_generated_tokens = sequence.output().len();
    let reason = if !params.ignore_eos && params.stop_token_ids.contains(&token_id) {
        Some(FinishReason::Stop { token_id })
    } else {
        events.push((sequence.id, TokenEvent::Token { token_id }));
        (num_generated_tokens == params.max_tokens).then_some(FinishReason::Length)
    };
    if let Some(reason) = reason {
        events.push((sequence.id, TokenEvent::Finished { reason, num_generated_tokens }));
    }
    reason.is_some()
}

fn fail(id: RequestId, error: SequenceError, events: &mut Vec<(RequestId, TokenEvent)>) -> bool {
    events.push((id, TokenEvent::Failed(error)));
    true
}

#[cfg(test)]
mod tests;
