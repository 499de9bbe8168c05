//! Owns the draft tokens in a step: whose, how many, and what becomes of their blocks.
//!
//! Invariant: drafts take what is left. None is computed beside a prompt, none takes a block that is cached for
//! others, and the blocks of rejected ones are free before the next step. Drafts lie behind the known tokens, so
//! they are never written to a block that is published.

use super::Scheduler;
use crate::cost_model::PrefillBudget;
use crate::request::RequestId;

impl Scheduler {
    /// Adds draft tokens to a step of decodes, the first ones first, as far as `budget` and free blocks go. None is
    /// added whose probability of being accepted is below `price`.
    pub(super) fn plan_drafts(&mut self, mut budget: PrefillBudget, price: f64) {
        // While the cost of a row is not learnt well, a prompt beside many of them would be blamed for it.
        if self.running.iter().any(|running| running.num_planned_tokens > 1) {
            return;
        }
        for running in self.running.iter_mut().filter(|running| running.num_pending_tokens() == 1) {
            if running.num_planned_tokens == 0 || !budget.is_open() {
                continue;
            }
            let end = running.num_computed_tokens + 1;
            let num_blocks = running.block_table.blocks().len() + self.pool.num_unused();
            let num_slots = num_blocks * self.pool.block_size() - end;
            let most = self.config.max_num_draft_tokens.min(num_slots);
            let num_drafts = running.sequence.num_drafts(price, most);
            let num_drafts = budget.take(end, num_drafts);
            if running.block_table.grow(end + num_drafts, &mut self.pool) {
                running.num_draft_tokens = num_drafts;
            }
        }
    }

    /// Records that so many of a sequence's draft tokens were accepted, after its share was committed; the slots
    /// of the others are free again.
    pub fn commit_drafts(&mut self, id: RequestId, num_accepted: usize) {
        self.commit(id, num_accepted);
        if let Some(index) = self.position(id) {
            let running = &mut self.running[index];
            running.block_table.shrink(running.num_computed_tokens, &mut self.pool);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::EngineConfig;
    use crate::cost_model::StepBudget;
    use crate::kv_cache::Prefix;
    use crate::request::Request;
    use crate::sampling_params::SamplingParams;
    use crate::scheduler::ScheduleOutcome;
    use crate::sequence::Sequence;
    use crate::step::StepPlan;

    fn add(scheduler: &mut Scheduler, id: u64, prompt: &[u32]) {
        let sampling = SamplingParams { max_tokens: 20, ..Default::default() };
        let request = Request { prompt_token_ids: prompt.to_vec(), sampling, ..Request::default() };
        scheduler.add(Sequence::new(RequestId(id), request, Duration::ZERO));
    }

    fn schedule(scheduler: &mut Scheduler) -> StepPlan {
        let mut plan = StepPlan::default();
        let budget = StepBudget { prefill: 100.into(), draft_price: 0.0 };
        scheduler.schedule(Duration::ZERO, budget, &mut plan, &mut ScheduleOutcome::default());
        plan
    }

    /// A sequence that says 1 again and again, and lacks the last token of its first block of four.
    fn repeating(num_blocks: usize, before: impl FnOnce(&mut Scheduler)) -> Scheduler {
        let config = EngineConfig { watermark_permille: 0, ..EngineConfig::default() };
        let mut scheduler = Scheduler::new(config, num_blocks, 4);
        before(&mut scheduler);
        add(&mut scheduler, 1, &[1, 1, 1]);
        schedule(&mut scheduler);
        scheduler.commit(RequestId(1), 3).unwrap().push(1);
        scheduler
    }

    #[test]
    fn drafts_take_no_block_that_is_cached() {
        let mut scheduler = repeating(4, |_| ());
        assert_eq!(schedule(&mut scheduler).drafts(0), [1; 8]);
        let other = [50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61];
        let mut scheduler = repeating(4, |scheduler| {
            add(scheduler, 0, &other);
            schedule(scheduler);
            scheduler.commit(RequestId(0), 12);
            scheduler.remove(RequestId(0));
        });
        assert_eq!((scheduler.pool.num_free(), scheduler.pool.num_unused()), (3, 0));
        assert_eq!(schedule(&mut scheduler).drafts(0), [0; 0]);
        assert!(scheduler.pool.find(Prefix::Empty { salt: 0 }, &other[..4]).is_some());
    }

    #[test]
    fn blocks_of_drafts_are_no_blocks_that_others_lack_and_go_back() {
        let mut scheduler = repeating(4, |_| ());
        assert_eq!(schedule(&mut scheduler).drafts(0).len(), 8);
        add(&mut scheduler, 2, &[7]);
        assert_eq!((scheduler.pool.num_free(), scheduler.num_free_slots()), (1, 63));
        assert_eq!(scheduler.check(), Ok(()));
        scheduler.commit(RequestId(1), 1).unwrap().push(1);
        scheduler.commit_drafts(RequestId(1), 0);
        assert_eq!((scheduler.pool.num_free(), scheduler.check()), (3, Ok(())));
    }
}
