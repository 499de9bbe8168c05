//! Owns who is let in: from the queue to the running list, with the blocks that are cached.
//!
//! Invariant: a sequence is let in only if all its known tokens fit beside what the running ones
//! still have to compute.

use std::time::Duration;

use super::{ScheduleOutcome, Scheduler};
use crate::cost_model::PrefillBudget;
use crate::kv_cache::{BlockTable, Prefix, num_shared_blocks};
use crate::observer::AdmissionReport;
use crate::sequence::{RunningSequence, Sequence, WaitingSequence};

impl Scheduler {
    /// Lets a waiting probe in at once, beside as many sequences as may run and in the blocks of
    /// whoever must go: what decides whether the engine is well must not wait for users.
    pub(super) fn admit_probe(&mut self, now: Duration, outcome: &mut ScheduleOutcome) {
        if !self.waiting.peek().is_some_and(|next| next.is_probe) {
            return;
        }
        let Some(waiting) = self.waiting.pop() else {
            return;
        };
        let num_blocks = self.pool.blocks_for(waiting.0.tokens().len());
        while self.pool.num_free() < num_blocks && self.preempt_last(outcome) {}
        self.start(waiting, &mut 0.into(), now, outcome);
    }

    /// Admits from the head of the queue while sequences, tokens and blocks allow. A sequence is let
    /// in only if all its known tokens fit beside what the running ones still have to compute.
    pub(super) fn admit(
        &mut self,
        now: Duration,
        prefill_budget: &mut PrefillBudget,
        outcome: &mut ScheduleOutcome,
    ) {
        let mut num_reserved = self.num_reserved();
        while self.running.len() < self.config.max_num_seqs && prefill_budget.is_open() {
            let Some(next) = self.waiting.peek() else {
                return;
            };
            if !self.has_room(next, num_reserved) {
                return;
            }
            let Some(waiting) = self.waiting.pop() else {
                return;
            };
            num_reserved += self.start(waiting, prefill_budget, now, outcome);
        }
    }

    /// Blocks that the running sequences lack for the tokens they know.
    pub(super) fn num_reserved(&self) -> usize {
        self.running.iter().map(|running| self.num_blocks_to_come(running)).sum()
    }

    fn num_blocks_to_come(&self, running: &RunningSequence) -> usize {
        // While a step runs, drafts may hold more.
        let num_blocks = self.pool.blocks_for(running.sequence.tokens().len());
        num_blocks.saturating_sub(running.block_table.blocks().len())
    }

    /// Whether a sequence fits beside `num_reserved` blocks and the watermark.
    pub(super) fn has_room(&self, sequence: &Sequence, num_reserved: usize) -> bool {
        let watermark = if self.running.is_empty() { 0 } else { self.watermark };
        let num_available = self.pool.num_free().saturating_sub(num_reserved + watermark);
        let num_blocks = self.pool.blocks_for(sequence.tokens().len());
        // Cached blocks are counted as free until a sequence references them.
        num_blocks <= num_available
            || num_blocks
                <= num_available + num_shared_blocks(sequence.tokens(), self.prefix(sequence), &self.pool)
    }

    /// Where a sequence's blocks start in the prefix cache; `None` if it takes no part. A probe takes
    /// none: it is there to compute.
    fn prefix(&self, sequence: &Sequence) -> Option<Prefix> {
        let salt = self.config.prefix_caching.salt(sequence.tenant).filter(|_| !sequence.is_probe)?;
        Some(Prefix::Empty { salt })
    }

    /// Moves a sequence to the running list, takes what is cached of it, and plans as many tokens after
    /// that as fit `budget`, whose blocks are free. Returns how many blocks it lacks for the rest.
    fn start(
        &mut self,
        waiting: WaitingSequence,
        budget: &mut PrefillBudget,
        now: Duration,
        outcome: &mut ScheduleOutcome,
    ) -> usize {
        let is_first_time = waiting.0.admission.is_none();
        let prefix = self.prefix(&waiting.0);
        let table = BlockTable::new(self.max_num_blocks, prefix);
        let mut running = waiting.admit(table, self.num_admissions);
        let num_cached_tokens = running.block_table.adopt(running.sequence.tokens(), &mut self.pool);
        running.num_computed_tokens = num_cached_tokens;
        let num_planned = budget.take(num_cached_tokens, running.num_pending_tokens());
        if running.block_table.grow(num_cached_tokens + num_planned, &mut self.pool) {
            running.num_planned_tokens = num_planned;
        }
        if self.config.max_num_draft_tokens > 0 {
            // Now, since it allocates.
            running.sequence.read_for_drafts();
        }
        if is_first_time {
            self.num_admissions += 1;
            let sequence = &mut running.sequence;
            // They were computed for another sequence.
            sequence.num_reported_prompt_tokens = num_cached_tokens;
            sequence.num_charged_tokens = sequence.num_prompt_tokens();
            if !sequence.is_probe {
                let num_input_tokens = sequence.num_prompt_tokens() - num_cached_tokens;
                self.waiting.charge(sequence.tenant, num_input_tokens, 0);
            }
            let report = AdmissionReport {
                is_probe: sequence.is_probe,
                queue_time: now.saturating_sub(sequence.arrival),
                num_queried_tokens: prefix.map_or(0, |_| sequence.num_prompt_tokens()),
                num_cached_tokens,
            };
            outcome.admitted.push((sequence.id, report));
        }
        let num_blocks_to_come = self.num_blocks_to_come(&running);
        self.insert_running(running);
        self.queue_version += 1;
        num_blocks_to_come
    }
}
