//! Owns the queue, the running sequences and the block pool: what runs in the next step.
//!
//! A pure function of its state, its input and the time it is told: no clock, no channel, no I/O.
//! Invariants ([`Scheduler::check`]): both lists are in order of arrival; every block is free or in
//! exactly the tables that count it; the oldest running sequence is never preempted, and since no
//! sequence larger than the pool is let in, the oldest always advances: nothing starves.

use std::collections::VecDeque;
use std::time::Duration;

use crate::config::EngineConfig;
use crate::kv_cache::BlockPool;
use crate::observer::EngineGauges;
use crate::request::RequestId;
use crate::sequence::{RunningSequence, Sequence, WaitingSequence};
use crate::step::StepPlan;

/// What a call of [`Scheduler::schedule`] did besides filling the plan. Reused between steps.
#[derive(Debug, Default)]
pub struct ScheduleOutcome {
    /// Sequences sent back to the queue.
    pub num_preemptions: usize,
    /// Queue times of the sequences that were admitted for the first time.
    pub queue_times: Vec<Duration>,
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
    /// Index into `running` and number of tokens, for the step being planned.
    chosen: Vec<(usize, usize)>,
}

impl Scheduler {
    /// An idle scheduler over `num_blocks` blocks of `block_size` tokens.
    pub fn new(config: EngineConfig, num_blocks: usize, block_size: usize) -> Self {
        let pool = BlockPool::new(num_blocks, block_size);
        Self {
            watermark: num_blocks * config.watermark_permille / 1000,
            max_num_blocks: pool.blocks_for(config.max_model_len),
            chosen: Vec::with_capacity(config.max_num_seqs),
            running: Vec::with_capacity(config.max_num_seqs),
            waiting: VecDeque::new(),
            config,
            pool,
        }
    }

    /// Queues a sequence, which must be younger than every other and small enough for the pool.
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(WaitingSequence(sequence));
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
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

    /// Fills `plan` with the next step: a token for every sequence that lacks one, then chunks of
    /// prompts up to the token budget, admitting from the queue while there is room.
    pub fn schedule(&mut self, now: Duration, plan: &mut StepPlan, outcome: &mut ScheduleOutcome) {
        outcome.num_preemptions = 0;
        outcome.queue_times.clear();
        self.chosen.clear();
        let mut prefill_budget = self.continue_running(outcome);
        if outcome.num_preemptions == 0 {
            self.admit(now, &mut prefill_budget, outcome);
        }
        let width = |&(index, _): &(usize, usize)| self.running[index].block_table.blocks().len();
        plan.clear(self.chosen.iter().map(width).max().unwrap_or(0));
        for &(index, num_tokens) in &self.chosen {
            let RunningSequence { sequence, num_computed_tokens: start, block_table } = &self.running[index];
            let end = start + num_tokens;
            plan.push(
                sequence.id,
                &sequence.tokens()[*start..end],
                *start,
                block_table.blocks(),
                self.pool.block_size(),
                end == sequence.tokens().len(),
            );
        }
    }

    /// Chooses tokens for the running sequences, oldest first, and returns the budget left for
    /// prompts. Decodes are set aside first, so that no prompt takes the place of a running stream.
    fn continue_running(&mut self, outcome: &mut ScheduleOutcome) -> usize {
        let num_decodes = self.running.iter().filter(|running| running.num_pending_tokens() == 1).count();
        let mut prefill_budget = self.config.max_num_batched_tokens - num_decodes;
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
            if num_tokens > 0 {
                self.chosen.push((index, num_tokens));
            }
            index += 1;
        }
        prefill_budget
    }

    /// Grows the table of the sequence at `index`, preempting the newest sequences as long as blocks
    /// are missing. False if that sequence itself was the newest and had to go.
    fn make_room(&mut self, index: usize, num_tokens: usize, outcome: &mut ScheduleOutcome) -> bool {
        loop {
            let running = &mut self.running[index];
            if running.block_table.grow(running.num_computed_tokens + num_tokens, &mut self.pool) {
                return true;
            }
            let Some(newest) = self.running.pop() else {
                return false;
            };
            self.waiting.push_front(newest.preempt(&mut self.pool));
            outcome.num_preemptions += 1;
            if self.running.len() == index {
                return false;
            }
        }
    }

    /// Admits from the head of the queue while sequences, tokens and blocks allow. A sequence is let
    /// in only if all its known tokens fit beside what the running ones still have to compute.
    fn admit(&mut self, now: Duration, prefill_budget: &mut usize, outcome: &mut ScheduleOutcome) {
        let blocks_to_come = |running: &RunningSequence| {
            self.pool.blocks_for(running.sequence.tokens().len()) - running.block_table.blocks().len()
        };
        let mut num_reserved: usize = self.running.iter().map(blocks_to_come).sum();
        while self.running.len() < self.config.max_num_seqs && *prefill_budget > 0 {
            let Some(WaitingSequence(next)) = self.waiting.front() else {
                return;
            };
            let num_blocks = self.pool.blocks_for(next.tokens().len());
            let watermark = if self.running.is_empty() { 0 } else { self.watermark };
            if self.pool.num_free() < num_reserved + num_blocks + watermark {
                return;
            }
            let Some(waiting) = self.waiting.pop_front() else {
                return;
            };
            let mut running = waiting.admit(self.max_num_blocks);
            let num_tokens = running.num_pending_tokens().min(*prefill_budget);
            if !running.block_table.grow(num_tokens, &mut self.pool) {
                // Cannot happen: the blocks were counted above. Losing the sequence would be worse.
                self.waiting.push_front(running.preempt(&mut self.pool));
                return;
            }
            num_reserved += num_blocks - running.block_table.blocks().len();
            *prefill_budget -= num_tokens;
            if !running.sequence.was_admitted {
                running.sequence.was_admitted = true;
                outcome.queue_times.push(now.saturating_sub(running.sequence.arrival));
            }
            self.chosen.push((self.running.len(), num_tokens));
            self.running.push(running);
        }
    }

    /// Records that a sequence's share of the step was computed. Returns the sequence.
    pub fn commit(&mut self, id: RequestId, num_tokens: usize) -> Option<&mut Sequence> {
        let index = self.position(id)?;
        let running = &mut self.running[index];
        running.num_computed_tokens += num_tokens;
        Some(&mut running.sequence)
    }

    /// Removes a sequence wherever it is and frees its blocks. False if it is not there.
    pub fn remove(&mut self, id: RequestId) -> bool {
        if let Some(index) = self.position(id) {
            self.running.remove(index).block_table.release(&mut self.pool);
            return true;
        }
        match self.waiting.binary_search_by_key(&id, |waiting| waiting.0.id) {
            Ok(index) => self.waiting.remove(index).is_some(),
            Err(_) => false,
        }
    }

    fn position(&self, id: RequestId) -> Option<usize> {
        self.running.binary_search_by_key(&id, |running| running.sequence.id).ok()
    }

    /// Checks every invariant; for tests and simulations, after each step.
    ///
    /// # Errors
    /// Says which invariant is broken.
    pub fn check(&self) -> Result<(), String> {
        self.pool.check(self.running.iter().map(|running| running.block_table.blocks()))?;
        let ids = self.running.iter().map(|running| running.sequence.id);
        let ids: Vec<_> = ids.chain(self.waiting.iter().map(|waiting| waiting.0.id)).collect();
        if !ids.is_sorted_by(|a, b| a < b) {
            return Err(format!("running and waiting are not in order of arrival: {ids:?}"));
        }
        if self.running.len() > self.config.max_num_seqs {
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
