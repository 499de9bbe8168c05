//! Owns the whole machine between a request and its events: plan a step ([`Engine::plan`]), run it
//! ([`Engine::run`]), and learn from the time that it took ([`Engine::finish`]).
//!
//! Invariant: counters move only after a run succeeded. If it fails, its sequences end with an
//! error, every other one is untouched. Must not know clocks, threads or channels: it is told what time it is.

use std::time::Duration;

use crate::config::EngineConfig;
use crate::cost_model::{CostModel, StepBounds, StepBudget, StepWork};
use crate::error::{LoadError, RunErrorKind, SequenceError};
use crate::fault::Fault;
use crate::observer::{AdmissionReport, StepReport};
use crate::request::{FinishReason, Request, RequestId, TokenEvent};
use crate::runner::ModelRunner;
use crate::sampler::Sampler;
use crate::scheduler::{ScheduleOutcome, Scheduler};
use crate::sequence::Sequence;
use crate::step::{StepOutput, StepPlan};

/// Scheduler, runner, sampler and cost model, and the buffers between them.
#[derive(Debug)]
pub struct Engine<R> {
    scheduler: Scheduler,
    runner: R,
    sampler: Sampler,
    costs: CostModel,
    bounds: StepBounds,
    next_id: u64,
    max_consecutive_run_errors: u32,
    num_run_errors: u32,
    /// Most tokens of prompts in a step, since one with more found no memory.
    max_num_prefill_tokens: Option<usize>,
    /// Whether the last step that ran found memory.
    has_room: bool,
    plan: StepPlan,
    outcome: ScheduleOutcome,
    events: Vec<(RequestId, TokenEvent)>,
    /// Of the step that is planned or has run.
    report: StepReport,
}

impl<R: ModelRunner> Engine<R> {
    /// An idle engine. `config.max_model_len` must fit the model and the runner's cache.
    pub fn new(runner: R, config: EngineConfig, vocab_size: usize) -> Self {
        let cache = runner.kv_cache();
        Self {
            sampler: Sampler::new(vocab_size),
            costs: CostModel::default(),
            bounds: StepBounds {
                max_step_time: config.max_step_time,
                target_inter_token_latency: config.target_inter_token_latency,
                max_num_batched_tokens: config.max_num_batched_tokens,
                block_size: cache.block_size,
            },
            next_id: 0,
            max_consecutive_run_errors: config.max_consecutive_run_errors,
            num_run_errors: 0,
            max_num_prefill_tokens: None,
            has_room: true,
            scheduler: Scheduler::new(config, cache.num_blocks, cache.block_size),
            plan: StepPlan::default(),
            outcome: ScheduleOutcome::default(),
            events: Vec::new(),
            report: StepReport::default(),
            runner,
        }
    }

    /// As [`ModelRunner::prepare`].
    ///
    /// # Errors
    /// As there.
    pub fn prepare(&mut self) -> Result<(), LoadError> {
        self.runner.prepare()
    }

    /// Queues a request that was submitted at `arrival`. It must fit, and its tenant must be configured. Ids grow in
    /// the order of the calls.
    pub fn submit(&mut self, request: Request, arrival: Duration) -> RequestId {
        self.enqueue(request, arrival, false)
    }

    /// As [`Engine::submit`], before all others and beside as many as may run. There may be one at a time.
    pub fn submit_probe(&mut self, request: Request, arrival: Duration) -> RequestId {
        self.enqueue(request, arrival, true)
    }

    fn enqueue(&mut self, request: Request, arrival: Duration, is_probe: bool) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let mut sequence = Sequence::new(id, request, arrival);
        sequence.is_probe = is_probe;
        self.scheduler.add(sequence);
        id
    }

    /// Says whether anybody reads a request: if not, it is preempted before the others.
    pub fn set_detached(&mut self, id: RequestId, is_detached: bool) {
        self.scheduler.set_detached(id, is_detached);
    }

    /// Forgets a request and frees its blocks; no event follows.
    pub fn abort(&mut self, id: RequestId) {
        self.scheduler.remove(id);
    }

    /// Whether a step would do nothing.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// The scheduler, for reading: the waiting and the running requests, and the use of the cache.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// What was learnt about time.
    pub fn costs(&self) -> &CostModel {
        &self.costs
    }

    /// Bounds of a step.
    pub fn bounds(&self) -> &StepBounds {
        &self.bounds
    }

    /// Events since the last step was planned, in order.
    pub fn events(&self) -> &[(RequestId, TokenEvent)] {
        &self.events
    }

    /// The requests that the last step admitted for the first time.
    pub fn admitted(&self) -> &[(RequestId, AdmissionReport)] {
        &self.outcome.admitted
    }

    /// The last step that was planned.
    pub fn step_plan(&self) -> &StepPlan {
        &self.plan
    }

    /// Plans the next step by what was learnt about time. [`Engine::events`] has the admissions.
    pub fn plan(&mut self, now: Duration) {
        let budget = self.costs.step_budget(&self.scheduler.decodes(), &self.bounds);
        self.schedule(now, budget);
    }

    /// Plans the next step within a budget that does not depend on what was learnt. A block of a prompt is taken even
    /// so.
    #[cfg(any(test, feature = "test-doubles"))]
    pub fn plan_within(&mut self, now: Duration, budget: impl Into<StepBudget>) {
        self.schedule(now, budget.into());
    }

    fn schedule(&mut self, now: Duration, budget: StepBudget) {
        self.events.clear();
        let prefill = match self.max_num_prefill_tokens {
            Some(most) => budget.prefill.bounded(0, most),
            None => budget.prefill,
        };
        let budget = StepBudget { prefill, ..budget };
        self.scheduler.schedule(now, budget, &mut self.plan, &mut self.outcome);
        self.events.extend(
            self.outcome.admitted.iter().map(|(id, report)| {
                (*id, TokenEvent::Admitted { num_cached_tokens: report.num_cached_tokens })
            }),
        );
    }

    /// Plans a step within `budget`, runs it and finishes it in no time.
    #[cfg(any(test, feature = "test-doubles"))]
    pub fn step(&mut self, now: Duration, budget: impl Into<StepBudget>) -> StepReport {
        self.plan_within(now, budget);
        self.run();
        self.finish(Duration::ZERO)
    }

    /// Runs the planned step and applies its outcome. Its events follow those of the plan.
    pub fn run(&mut self) {
        self.report = StepReport {
            num_scheduled_tokens: self.plan.num_tokens(),
            num_preemptions: self.outcome.num_preemptions,
            serves_users: !self.plan.sequences.iter().all(|scheduled| self.scheduler.is_probe(scheduled.id)),
            ..StepReport::default()
        };
        if self.plan.is_empty() {
            return;
        }
        let mut output = match self.runner.run(&self.plan) {
            Ok(output) => output,
            Err(error) => {
                if error.kind == RunErrorKind::OutOfMemory && self.shrink() {
                    return;
                }
                self.report.failed = true;
                self.report.fault = error.is_permanent().then_some(Fault::DeviceLost);
                for scheduled in &self.plan.sequences {
                    self.scheduler.remove(scheduled.id);
                    self.events.push((scheduled.id, TokenEvent::Failed(error.clone().into())));
                }
                return;
            }
        };
        self.has_room = true;
        let report = &mut self.report;
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
                    match error {
                        SequenceError::NonFiniteLogits { .. } => {
                            report.num_non_finite += 1;
                            report.fault.get_or_insert(Fault::NonFiniteLogits);
                        }
                        // The rows could not be copied: what the device computed may have failed, too.
                        SequenceError::Run(_) => report.failed = true,
                        SequenceError::DeviceLost(_) => {
                            report.failed = true;
                            report.fault = Some(Fault::DeviceLost);
                        }
                        _ => {}
                    }
                    if !matches!(error, SequenceError::CannotSample(_)) {
                        // What a machine in doubt has computed is not served to others.
                        self.scheduler.forget_cached();
                    }
                }
                self.scheduler.remove(scheduled.id);
            }
        }
    }

    /// Takes less of prompts in a step from now on, after one that found no memory. Nothing was computed, so that the
    /// next plan has the same tokens again, as far as they fit. False if the step before was made smaller already, or
    /// has no prompts to shrink.
    fn shrink(&mut self) -> bool {
        let num_tokens = StepWork::of(&self.plan).num_prefill_tokens;
        if num_tokens <= self.bounds.block_size || !std::mem::take(&mut self.has_room) {
            return false;
        }
        self.max_num_prefill_tokens = Some((num_tokens / 2).max(self.bounds.block_size));
        self.report = StepReport { is_shrunk: true, num_scheduled_tokens: 0, ..self.report };
        true
    }

    /// Learns from the step that has run and took so long, sampling included. Returns its figures.
    pub fn finish(&mut self, took: Duration) -> StepReport {
        let report = &mut self.report;
        report.duration = took;
        if report.failed {
            self.num_run_errors = self.num_run_errors.saturating_add(1);
            if self.num_run_errors >= self.max_consecutive_run_errors {
                report.fault.get_or_insert(Fault::RepeatedRunErrors { count: self.num_run_errors });
            }
        } else if !report.is_shrunk {
            self.num_run_errors = 0;
            let work = StepWork::of(&self.plan);
            self.costs.observe_step(&work, took);
            let num_decodes = work.num_decodes.saturating_sub(report.num_draft_tokens);
            self.costs.observe_drafts(num_decodes, report.num_draft_tokens, report.num_accepted_draft_tokens);
        }
        *report
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
    sampler.sample(output.logits.row(row)?, sequence)
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
