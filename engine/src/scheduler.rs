//! Owns the queue, the running sequences and the block pool: what runs in the next step.
//!
//! A pure function of its state, its input and the time it is told: no clock, no channel, no I/O.
//! Invariants ([`Scheduler::check`]): both lists are in the order of their `precedence`; every block
//! is free or in exactly the tables that count it. Only the last of the running list is preempted:
//! the newest detached sequence, else the newest. So its first, the probe or else the oldest attached
//! sequence, is only ever preempted to let a probe in, and since no sequence larger than the pool is
//! let in, it always advances. A detached sequence can lose its blocks to younger ones, but those are
//! let in only by a step that has budget left, in which every running sequence gains a token: it
//! advances from one loss to the next. The queue's order is by deadlines that are never far after
//! arrival. Hence nothing starves.

use std::collections::VecDeque;
use std::time::Duration;

use crate::config::{EngineConfig, PrefixCaching};
use crate::kv_cache::{BlockPool, BlockTable, Prefix, num_shared_blocks};
use crate::observer::{AdmissionReport, EngineGauges};
use crate::request::RequestId;
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
    waiting: VecDeque<WaitingSequence>,
    running: Vec<RunningSequence>,
    pool: BlockPool,
    watermark: usize,
    max_num_blocks: usize,
    num_admissions: u64,
    /// Whether the queue changed since it was last asked.
    queue_changed: bool,
}

impl Scheduler {
    /// An idle scheduler over `num_blocks` blocks of `block_size` tokens.
    pub fn new(config: EngineConfig, num_blocks: usize, block_size: usize) -> Self {
        let pool = BlockPool::new(num_blocks, block_size);
        Self {
            watermark: num_blocks * config.watermark_permille / 1000,
            max_num_blocks: pool.blocks_for(config.max_model_len),
            // Every one, the probe's too, may be sent back to the queue.
            waiting: VecDeque::with_capacity(config.max_num_seqs + config.max_num_waiting + 1),
            running: Vec::with_capacity(config.max_num_seqs + 1),
            num_admissions: 0,
            queue_changed: false,
            config,
            pool,
        }
    }

    /// Queues a sequence, which must be younger than every other and small enough for the pool. A
    /// deadline later than the default one is cut to it.
    pub fn add(&mut self, mut sequence: Sequence) {
        let latest = sequence.arrival.saturating_add(self.config.default_deadline);
        sequence.deadline = sequence.deadline.min(latest);
        self.enqueue(WaitingSequence(sequence));
    }

    fn enqueue(&mut self, sequence: WaitingSequence) {
        let precedence = sequence.precedence();
        let index = self.waiting.partition_point(|other| other.precedence() < precedence);
        self.waiting.insert(index, sequence);
        self.queue_changed = true;
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// The queue, the next one first.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = &Sequence> {
        self.waiting.iter().map(|waiting| &waiting.0)
    }

    /// The running sequences; the last is preempted first.
    pub fn running(&self) -> &[RunningSequence] {
        &self.running
    }

    /// Running sequences that lack one token only.
    pub fn num_decodes(&self) -> usize {
        self.running.iter().filter(|running| running.num_pending_tokens() == 1).count()
    }

    /// How many sequences could be admitted without the end of another one: none if the head of the
    /// queue lacks blocks.
    pub fn num_free_slots(&self) -> usize {
        let lacks_blocks = |waiting: &WaitingSequence| !self.has_room(&waiting.0, self.num_reserved());
        if self.waiting.front().is_some_and(lacks_blocks) {
            return 0;
        }
        self.config.max_num_seqs.saturating_sub(self.running.len())
    }

    /// Whether the queue changed since the last call.
    pub fn take_queue_changed(&mut self) -> bool {
        std::mem::take(&mut self.queue_changed)
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
        } else if let Some(waiting) = self.waiting.iter_mut().find(|waiting| waiting.0.id == id) {
            waiting.0.is_detached = is_detached;
        }
    }

    fn insert_running(&mut self, running: RunningSequence) {
        let precedence = running.precedence();
        let index = self.running.partition_point(|other| other.precedence() < precedence);
        self.running.insert(index, running);
    }

    /// Fills `plan` with the next step: a token for every sequence that lacks one, then chunks of
    /// prompts, admitting from the queue while there is room. Of prompts it takes `prefill_budget`
    /// tokens, but at least a block, and never more than the step may hold beside its decodes.
    pub fn schedule(
        &mut self,
        now: Duration,
        prefill_budget: usize,
        plan: &mut StepPlan,
        outcome: &mut ScheduleOutcome,
    ) {
        outcome.num_preemptions = 0;
        outcome.admitted.clear();
        self.running.iter_mut().for_each(|running| running.num_planned_tokens = 0);
        self.admit_probe(now, outcome);
        let mut prefill_budget = self.continue_running(prefill_budget, outcome);
        if outcome.num_preemptions == 0 {
            self.admit(now, &mut prefill_budget, outcome);
        }
        let planned = || self.running.iter().filter(|running| running.num_planned_tokens > 0);
        plan.clear(planned().map(|running| running.block_table.blocks().len()).max().unwrap_or(0));
        for running in planned() {
            let RunningSequence { sequence, num_computed_tokens: start, .. } = running;
            let end = start + running.num_planned_tokens;
            plan.push(
                sequence.id,
                &sequence.tokens()[*start..end],
                *start,
                running.block_table.blocks(),
                self.pool.block_size(),
                end == sequence.tokens().len(),
            );
        }
    }

    /// Lets a waiting probe in at once, beside as many sequences as may run and in the blocks of
    /// whoever must go: what decides whether the engine is well must not wait for users.
    fn admit_probe(&mut self, now: Duration, outcome: &mut ScheduleOutcome) {
        if !self.waiting.front().is_some_and(|waiting| waiting.0.is_probe) {
            return;
        }
        let Some(waiting) = self.waiting.pop_front() else {
            return;
        };
        let num_blocks = self.pool.blocks_for(waiting.0.tokens().len());
        while self.pool.num_free() < num_blocks && self.preempt_last(outcome) {}
        self.start(waiting, 0, now, outcome);
    }

    /// Chooses tokens for the running sequences in order and returns the budget left for prompts.
    /// Decodes are set aside first, so that no prompt takes the place of a running stream.
    fn continue_running(&mut self, prefill_budget: usize, outcome: &mut ScheduleOutcome) -> usize {
        let most = self.config.max_num_batched_tokens.saturating_sub(self.num_decodes());
        let mut prefill_budget = prefill_budget.max(self.pool.block_size()).min(most);
        if self.running.first().is_some_and(|running| running.sequence.is_probe) {
            // The probe may be one more than the step was made for.
            prefill_budget = prefill_budget.max(1);
        }
        let mut index = 0;
        while index < self.running.len() {
            let num_pending = self.running[index].num_pending_tokens();
            let num_tokens = if num_pending == 1 { 1 } else { num_pending.min(prefill_budget) };
            if num_tokens > 0 && !self.make_room(index, num_tokens, outcome) {
                break;
            }
            if num_pending > 1 {
                prefill_budget -= num_tokens;
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
        let waiting = last.preempt(&mut self.pool);
        self.enqueue(waiting);
        outcome.num_preemptions += 1;
        true
    }

    /// Admits from the head of the queue while sequences, tokens and blocks allow. A sequence is let
    /// in only if all its known tokens fit beside what the running ones still have to compute.
    fn admit(&mut self, now: Duration, prefill_budget: &mut usize, outcome: &mut ScheduleOutcome) {
        let mut num_reserved = self.num_reserved();
        while self.running.len() < self.config.max_num_seqs && *prefill_budget > 0 {
            let Some(WaitingSequence(next)) = self.waiting.front() else {
                return;
            };
            if !self.has_room(next, num_reserved) {
                return;
            }
            let Some(waiting) = self.waiting.pop_front() else {
                return;
            };
            let (num_planned, num_blocks_to_come) = self.start(waiting, *prefill_budget, now, outcome);
            num_reserved += num_blocks_to_come;
            *prefill_budget -= num_planned;
        }
    }

    /// Blocks that the running sequences lack for the tokens they know.
    fn num_reserved(&self) -> usize {
        self.running.iter().map(|running| self.num_blocks_to_come(running)).sum()
    }

    fn num_blocks_to_come(&self, running: &RunningSequence) -> usize {
        self.pool.blocks_for(running.sequence.tokens().len()) - running.block_table.blocks().len()
    }

    /// Whether a sequence fits beside `num_reserved` blocks and the watermark.
    fn has_room(&self, sequence: &Sequence, num_reserved: usize) -> bool {
        let watermark = if self.running.is_empty() { 0 } else { self.watermark };
        let num_available = self.pool.num_free().saturating_sub(num_reserved + watermark);
        let num_blocks = self.pool.blocks_for(sequence.tokens().len());
        // Cached blocks are counted as free until somebody references them.
        num_blocks <= num_available
            || num_blocks
                <= num_available + num_shared_blocks(sequence.tokens(), self.prefix(sequence), &self.pool)
    }

    /// Where a sequence's blocks start in the prefix cache; `None` if it takes no part. A probe takes
    /// none: it is there to compute.
    fn prefix(&self, sequence: &Sequence) -> Option<Prefix> {
        match self.config.prefix_caching {
            _ if sequence.is_probe => None,
            PrefixCaching::Off => None,
            PrefixCaching::Shared => Some(Prefix::Empty { salt: 0 }),
            PrefixCaching::PerTenant => Some(Prefix::Empty { salt: u64::from(sequence.tenant.0) }),
        }
    }

    /// Moves a sequence to the running list, takes what is cached of it, and plans as many tokens after
    /// that as `budget` allows, whose blocks are free. Returns how many, and how many blocks it lacks
    /// for the rest.
    fn start(
        &mut self,
        waiting: WaitingSequence,
        budget: usize,
        now: Duration,
        outcome: &mut ScheduleOutcome,
    ) -> (usize, usize) {
        let is_first_time = waiting.0.admission.is_none();
        let prefix = self.prefix(&waiting.0);
        let table = BlockTable::new(self.max_num_blocks, prefix);
        let mut running = waiting.admit(table, self.num_admissions);
        let num_cached_tokens = running.block_table.adopt(running.sequence.tokens(), &mut self.pool);
        running.num_computed_tokens = num_cached_tokens;
        let num_planned = running.num_pending_tokens().min(budget);
        if running.block_table.grow(num_cached_tokens + num_planned, &mut self.pool) {
            running.num_planned_tokens = num_planned;
        }
        if is_first_time {
            self.num_admissions += 1;
            let sequence = &mut running.sequence;
            // They were computed for somebody else.
            sequence.num_reported_prompt_tokens = num_cached_tokens;
            let report = AdmissionReport {
                queue_time: now.saturating_sub(sequence.arrival),
                num_queried_tokens: prefix.map_or(0, |_| sequence.num_prompt_tokens()),
                num_cached_tokens,
            };
            outcome.admitted.push((sequence.id, report));
        }
        let num_blocks_to_come = self.num_blocks_to_come(&running);
        self.insert_running(running);
        self.queue_changed = true;
        (num_planned, num_blocks_to_come)
    }

    /// Records that a sequence's share of the step was computed, and lets others use the blocks that
    /// are full. Returns the sequence.
    pub fn commit(&mut self, id: RequestId, num_tokens: usize) -> Option<&mut Sequence> {
        let index = self.position(id)?;
        let running = &mut self.running[index];
        running.num_computed_tokens += num_tokens;
        running.num_planned_tokens = 0;
        let RunningSequence { sequence, num_computed_tokens, block_table, .. } = running;
        block_table.publish(sequence.tokens(), *num_computed_tokens, &mut self.pool);
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
        let index = self.waiting.iter().position(|waiting| waiting.0.id == id);
        self.queue_changed |= index.is_some();
        index.is_some_and(|index| self.waiting.remove(index).is_some())
    }

    fn position(&self, id: RequestId) -> Option<usize> {
        self.running.iter().position(|running| running.sequence.id == id)
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
        let queue = self.waiting.iter().map(WaitingSequence::precedence);
        if !queue.is_sorted_by(|a, b| a < b) {
            return Err(format!("the queue is out of order: {:?}", self.waiting));
        }
        let has_probe = self.running.iter().any(|running| running.sequence.is_probe);
        if self.running.len() > self.config.max_num_seqs + usize::from(has_probe) {
            return Err(format!("{} sequences run", self.running.len()));
        }
        for running in &self.running {
            let capacity = running.block_table.blocks().len() * self.pool.block_size();
            if running.num_computed_tokens > capacity || running.num_pending_tokens() == 0 {
                return Err(format!("computed tokens out of bounds: {running:?}"));
            }
        }
        Ok(())
    }
}
