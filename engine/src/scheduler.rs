//! Owns the queue, the running sequences and the block pool: what runs in the next step.
//!
//! A pure function of its state, its input and the time it is told: no clock, no channel, no I/O.
//! Invariants ([`Scheduler::check`]): the running list is in the order of its `precedence`; every block
//! is free, cached, or in exactly the tables that count it. Only the last of the running list is preempted:
//! the newest detached sequence, else the newest. So its first, the probe or else the oldest attached
//! sequence, is only ever preempted to let a probe in, and since no sequence larger than the pool is
//! let in, it always advances. A detached sequence can lose its blocks to younger ones, but those are
//! let in only by a step that has budget left, in which every running sequence gains a token: it
//! advances from one loss to the next. In the queue nothing starves ([`WaitingQueue`]). A tenant's share
//! is kept at admission only: no sequence is preempted for it.

mod admission;
mod drafts;

use std::sync::Arc;
use std::time::Duration;

use crate::config::EngineConfig;
use crate::cost_model::{PrefillBudget, StepBudget, StepWork};
use crate::kv_cache::{BlockId, BlockPool, CachedPrefixes};
use crate::observer::{AdmissionReport, EngineGauges};
use crate::queue::WaitingQueue;
use crate::request::{RequestId, TenantId};
use crate::sequence::{RunningSequence, Sequence, WaitingSequence};
use crate::step::StepPlan;

/// What a call of [`Scheduler::schedule`] did besides filling the plan. Reused between steps.
#[derive(Debug, Default)]
pub struct ScheduleOutcome {
    /// Sequences sent back to the queue.
    pub num_preemptions: usize,
    /// The sequences that were admitted for the first time.
    pub admitted: Vec<(RequestId, AdmissionReport)>,
}

/// Decides what runs.
#[derive(Debug)]
pub struct Scheduler {
    config: EngineConfig,
    waiting: WaitingQueue,
    running: Vec<RunningSequence>,
    pool: BlockPool,
    watermark: usize,
    max_num_blocks: usize,
    num_admissions: u64,
    /// Engine time of the step that is planned.
    now: Duration,
    /// Where the next sequence that is asked for is likely to be in the running list.
    likely_index: usize,
    /// Changes whenever the queue does.
    queue_version: u64,
}

impl Scheduler {
    /// An idle scheduler over `num_blocks` blocks of `block_size` tokens.
    pub fn new(config: EngineConfig, num_blocks: usize, block_size: usize) -> Self {
        let pool = BlockPool::new(num_blocks, block_size);
        Self {
            watermark: num_blocks * config.watermark_permille / 1000,
            max_num_blocks: pool.blocks_for(config.max_model_len),
            waiting: WaitingQueue::new(&config),
            running: Vec::with_capacity(config.max_num_seqs + 1),
            num_admissions: 0,
            now: Duration::ZERO,
            likely_index: 0,
            queue_version: 0,
            config,
            pool,
        }
    }

    /// What other threads may know of the prefix cache.
    pub fn cached_prefixes(&self) -> &Arc<CachedPrefixes> {
        self.pool.cached_prefixes()
    }

    /// Queues a sequence, which must be younger than every other, small enough for the pool and of a
    /// tenant that is configured. A deadline later than the default one is cut to it.
    pub fn add(&mut self, mut sequence: Sequence) {
        let latest = sequence.arrival.saturating_add(self.config.default_deadline);
        sequence.deadline = sequence.deadline.min(latest);
        sequence.yields_until = sequence.deadline;
        if !self.config.honours_priority {
            sequence.priority = 0;
        }
        self.enqueue(WaitingSequence(sequence));
    }

    fn enqueue(&mut self, sequence: WaitingSequence) {
        self.waiting.push(sequence);
        self.queue_version += 1;
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Sequences in the queue.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The queue, the next one first, in the order that can be foreseen: [`WaitingQueue::in_order`].
    pub fn waiting(&self) -> Vec<&Sequence> {
        self.waiting.in_order()
    }

    /// What a tenant was served: see [`WaitingQueue::service`].
    pub fn service(&self, tenant: TenantId) -> u64 {
        self.waiting.service(tenant)
    }

    /// The running sequences; the last is preempted first.
    pub fn running(&self) -> &[RunningSequence] {
        &self.running
    }

    /// The work of the running sequences that lack one token only.
    pub fn decodes(&self) -> StepWork {
        let mut work = StepWork::default();
        for running in self.running.iter().filter(|running| running.num_pending_tokens() == 1) {
            work.add(running.num_computed_tokens, 1, 0);
        }
        work
    }

    /// How many sequences could be admitted without the end of another one: none if the head of the
    /// queue lacks blocks and does not yield.
    pub fn num_free_slots(&self) -> usize {
        let lacks_blocks = |next: &Sequence| !next.is_yielding && !self.has_room(next, self.num_reserved());
        if self.waiting.peek().is_some_and(lacks_blocks) {
            return 0;
        }
        self.config.max_num_seqs.saturating_sub(self.running.len())
    }

    /// Changes whenever the queue does.
    pub fn queue_version(&self) -> u64 {
        self.queue_version
    }

    /// Figures of the current state.
    pub fn gauges(&self) -> EngineGauges {
        EngineGauges {
            num_running: self.running.len(),
            num_waiting: self.waiting.len(),
            num_used_blocks: self.pool.num_blocks() - self.pool.num_free(),
            num_blocks: self.pool.num_blocks(),
        }
    }

    /// Says whether anybody reads a sequence.
    pub fn set_detached(&mut self, id: RequestId, is_detached: bool) {
        if let Some(index) = self.position(id) {
            let mut running = self.running.remove(index);
            running.sequence.is_detached = is_detached;
            self.insert_running(running);
        } else {
            self.queue_version += u64::from(self.waiting.set_detached(id, is_detached));
        }
    }

    fn insert_running(&mut self, running: RunningSequence) {
        let precedence = running.precedence();
        let index = self.running.partition_point(|other| other.precedence() < precedence);
        self.running.insert(index, running);
    }

    /// Fills `plan` with the next step: a token for every sequence that lacks one, then chunks of
    /// prompts, admitting from the queue while there is room. Of prompts it takes what `budget`
    /// allows, but at least a block, and never more than the step may hold beside its decodes. In a
    /// step without prompts it may go to drafts.
    pub fn schedule(
        &mut self,
        now: Duration,
        budget: StepBudget,
        plan: &mut StepPlan,
        outcome: &mut ScheduleOutcome,
    ) {
        outcome.num_preemptions = 0;
        outcome.admitted.clear();
        self.now = now;
        self.queue_version += u64::from(self.waiting.promote(now));
        for running in &mut self.running {
            (running.num_planned_tokens, running.num_draft_tokens) = (0, 0);
        }
        self.admit_probe(now, outcome);
        let mut prefill_budget = self.continue_running(budget.prefill, outcome);
        if outcome.num_preemptions == 0 {
            self.admit(now, &mut prefill_budget, outcome);
            self.plan_drafts(prefill_budget, budget.draft_price);
        }
        let planned = || self.running.iter().filter(|running| running.num_planned_tokens > 0);
        plan.clear(planned().map(|running| running.block_table.blocks().len()).max().unwrap_or(0));
        for running in planned() {
            let RunningSequence { sequence, num_computed_tokens: start, .. } = running;
            let end = start + running.num_planned_tokens;
            let drafts = sequence.drafter.draft(sequence.tokens()).take(running.num_draft_tokens);
            let reaches_end = end == sequence.tokens().len();
            plan.push(
                sequence.id,
                sequence.tokens()[*start..end].iter().copied().chain(drafts),
                *start,
                running.block_table.blocks(),
                self.pool.block_size(),
                if reaches_end { 1 + running.num_draft_tokens } else { 0 },
            );
        }
    }

    /// Chooses tokens for the running sequences in order and returns the budget left for prompts.
    /// Decodes are set aside first, so that no prompt takes the place of a running stream.
    fn continue_running(
        &mut self,
        prefill_budget: PrefillBudget,
        outcome: &mut ScheduleOutcome,
    ) -> PrefillBudget {
        let most = self.config.max_num_batched_tokens.saturating_sub(self.decodes().num_decodes);
        // The probe may be one more than the step was made for.
        let has_probe = self.running.first().is_some_and(|running| running.sequence.is_probe);
        let most = most.max(usize::from(has_probe));
        let mut prefill_budget = prefill_budget.bounded(self.pool.block_size(), most);
        let mut index = 0;
        while index < self.running.len() {
            let start = self.running[index].num_computed_tokens;
            let num_tokens = match self.running[index].num_pending_tokens() {
                1 => 1,
                num_pending => prefill_budget.take(start, num_pending),
            };
            if num_tokens > 0 && !self.make_room(index, num_tokens, outcome) {
                break;
            }
            self.running[index].num_planned_tokens = num_tokens;
            index += 1;
        }
        prefill_budget
    }

    /// Grows the table of the sequence at `index`, preempting the last sequences as long as blocks
    /// are missing. False if that sequence itself was the last and had to go.
    fn make_room(&mut self, index: usize, num_tokens: usize, outcome: &mut ScheduleOutcome) -> bool {
        loop {
            let running = &mut self.running[index];
            if running.block_table.grow(running.num_computed_tokens + num_tokens, &mut self.pool) {
                return true;
            }
            if !self.preempt_last(outcome) || self.running.len() == index {
                return false;
            }
        }
    }

    /// Sends the last running sequence back to the queue. False if none runs.
    fn preempt_last(&mut self, outcome: &mut ScheduleOutcome) -> bool {
        let Some(last) = self.running.pop() else {
            return false;
        };
        let yields_until = self.now.saturating_add(self.config.default_deadline);
        let waiting = last.preempt(&mut self.pool, yields_until);
        self.enqueue(waiting);
        outcome.num_preemptions += 1;
        true
    }

    /// Records that `num_tokens` of a sequence's known tokens were computed, and lets others use the blocks
    /// that are full. Returns the sequence.
    pub fn commit(&mut self, id: RequestId, num_tokens: usize) -> Option<&mut Sequence> {
        let index = self.position(id)?;
        let running = &mut self.running[index];
        running.num_computed_tokens += num_tokens;
        running.num_planned_tokens = 0;
        let RunningSequence { sequence, num_computed_tokens, block_table, .. } = running;
        block_table.publish(sequence.tokens(), *num_computed_tokens, &mut self.pool);
        // Of a reply; the prompt was charged at its admission. What is computed again is not charged.
        let num_output_tokens = num_computed_tokens.saturating_sub(sequence.num_charged_tokens);
        sequence.num_charged_tokens += num_output_tokens;
        if num_output_tokens > 0 && !sequence.is_probe {
            self.waiting.charge(sequence.tenant, 0, num_output_tokens);
        }
        Some(&mut running.sequence)
    }

    /// Empties the prefix cache. Running sequences keep what they have, and share it no more.
    pub fn forget_cached(&mut self) {
        self.pool.forget_contents();
        self.running.iter_mut().for_each(|running| running.block_table.stop_publishing());
    }

    /// Removes a sequence wherever it is and frees its blocks. False if it is not there.
    pub fn remove(&mut self, id: RequestId) -> bool {
        if let Some(index) = self.position(id) {
            self.running.remove(index).block_table.release(&mut self.pool);
            return true;
        }
        let was_waiting = self.waiting.remove(id).is_some();
        self.queue_version += u64::from(was_waiting);
        was_waiting
    }

    /// Whether a running sequence is a probe, which is always the first one.
    pub fn is_probe(&self, id: RequestId) -> bool {
        let first = self.running.first().map(|running| &running.sequence);
        first.is_some_and(|sequence| sequence.is_probe && sequence.id == id)
    }

    /// Where a sequence is in the running list. A step's outcome is applied in the order of that list,
    /// so the next one that is asked for mostly stands at or behind the last one.
    fn position(&mut self, id: RequestId) -> Option<usize> {
        let is_it = |running: &RunningSequence| running.sequence.id == id;
        let likely = [self.likely_index, self.likely_index + 1];
        let found = likely.into_iter().find(|&index| self.running.get(index).is_some_and(is_it));
        let found = found.or_else(|| self.running.iter().position(is_it));
        self.likely_index = found.unwrap_or(0);
        found
    }

    /// Checks every invariant; for tests and simulations, after each step.
    ///
    /// # Errors
    /// Says which invariant is broken.
    pub fn check(&self) -> Result<(), String> {
        self.pool.check(self.running.iter().map(|running| running.block_table.blocks()))?;
        if !self.running.is_sorted_by(|a, b| a.precedence() < b.precedence()) {
            return Err(format!("the running sequences are out of order: {:?}", self.running));
        }
        self.waiting.check()?;
        let has_probe = self.running.iter().any(|running| running.sequence.is_probe);
        if self.running.len() > self.config.max_num_seqs + usize::from(has_probe) {
            return Err(format!("{} sequences run", self.running.len()));
        }
        for running in &self.running {
            let capacity = running.block_table.blocks().len() * self.pool.block_size();
            if running.num_computed_tokens > capacity || running.num_pending_tokens() == 0 {
                return Err(format!("computed tokens out of bounds: {running:?}"));
            }
            // Whatever comes next, known tokens or drafts, is written behind the computed ones.
            let num_full_blocks = running.num_computed_tokens / self.pool.block_size();
            let is_shared = |block: &&BlockId| !self.pool.is_exclusive(**block);
            if let Some(block) = running.block_table.blocks()[num_full_blocks..].iter().find(is_shared) {
                return Err(format!("block {block} will be written and others may read it: {running:?}"));
            }
        }
        Ok(())
    }
}
