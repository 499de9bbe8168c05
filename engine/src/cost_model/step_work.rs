//! Owns what a step computes, in the terms in which it costs time.

use crate::step::StepPlan;

/// What a step computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepWork {
    /// Tokens of prompts, or of whatever is computed in more than one token.
    pub num_prefill_tokens: usize,
    /// Sequences that take one token, and their drafts: a row each.
    pub num_decodes: usize,
    /// Pairs of a token of the step and a token that it attends to, itself included.
    pub num_pairs: usize,
}

impl StepWork {
    /// What a plan computes.
    pub fn of(plan: &StepPlan) -> Self {
        let mut work = Self::default();
        for sequence in &plan.sequences {
            let num_known_tokens = sequence.num_known_tokens();
            work.add(sequence.num_computed_tokens, num_known_tokens, sequence.num_draft_tokens());
        }
        work
    }

    /// Adds `num_known_tokens` tokens of a sequence that has `start` before them, and drafts after them.
    pub fn add(&mut self, start: usize, num_known_tokens: usize, num_draft_tokens: usize) {
        let num_tokens = num_known_tokens + num_draft_tokens;
        match num_known_tokens {
            1 => self.num_decodes += num_tokens,
            _ => self.num_prefill_tokens += num_tokens,
        }
        self.num_pairs += Self::pairs(start, num_tokens);
    }

    /// Pairs of `num_tokens` tokens after `start` others.
    pub fn pairs(start: usize, num_tokens: usize) -> usize {
        num_tokens * start + num_tokens * (num_tokens + 1) / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::RequestId;

    #[test]
    fn a_draft_is_a_row_of_its_decode_and_no_prefill() {
        let mut plan = StepPlan::default();
        plan.clear(3);
        plan.push(RequestId(0), [1], 10, &[0], 16, 1);
        plan.push(RequestId(1), [1, 2, 3, 4], 20, &[1, 2], 16, 4);
        plan.push(RequestId(2), [1, 2, 3], 0, &[3], 16, 1);
        let num_pairs = 11 + (21 + 22 + 23 + 24) + (1 + 2 + 3);
        assert_eq!(StepWork::of(&plan), StepWork { num_prefill_tokens: 3, num_decodes: 5, num_pairs });
    }
}
