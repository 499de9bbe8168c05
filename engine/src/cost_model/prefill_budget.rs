//! Owns how much of prompts a step may still take.
//!
//! Invariant: a prompt that is cut short closes the budget, so that no later one gets what was refused before.

/// Tokens and time that a step has for prompts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrefillBudget {
    /// Most tokens.
    num_tokens: usize,
    /// Tokens that are taken whatever they cost.
    num_granted: usize,
    left_s: f64,
    token_s: f64,
    pair_s: f64,
}

impl From<usize> for PrefillBudget {
    /// So many tokens, at no cost.
    fn from(num_tokens: usize) -> Self {
        Self::new(num_tokens, 0, 1.0, 0.0, 0.0)
    }
}

impl PrefillBudget {
    /// `left_s` seconds for up to `most` tokens of `token_s`, and `pair_s` more for each token that one
    /// attends to; `least` tokens even so.
    pub fn new(most: usize, least: usize, left_s: f64, token_s: f64, pair_s: f64) -> Self {
        Self { num_tokens: most, num_granted: least, left_s, token_s, pair_s }
    }

    /// The same for at least `least` and at most `most` tokens; `most` wins.
    pub fn bounded(self, least: usize, most: usize) -> Self {
        let num_tokens = self.num_tokens.max(least).min(most);
        Self { num_tokens, num_granted: self.num_granted.max(least), ..self }
    }

    /// Whether there is anything left.
    pub fn is_open(&self) -> bool {
        self.num_tokens > 0
    }

    /// How many of `wanted` tokens of a sequence that has `start` before them fit: one at least while
    /// it is open.
    pub fn fit(&self, start: usize, wanted: usize) -> usize {
        // The positive root of `pair_s / 2 * n^2 + linear * n = left_s`; infinite if all is free.
        let linear = self.token_s + self.pair_s * (start as f64 + 0.5);
        let left_s = self.left_s.max(0.0);
        let root = 2.0 * left_s / (linear + (linear * linear + 2.0 * self.pair_s * left_s).sqrt());
        let num_tokens = root.max(1.0) as usize;
        num_tokens.max(self.num_granted).min(wanted).min(self.num_tokens)
    }

    /// Takes as many of `wanted` tokens as fit, and says how many.
    pub fn take(&mut self, start: usize, wanted: usize) -> usize {
        let num_tokens = self.fit(start, wanted);
        let pairs = num_tokens as f64 * (start as f64 + (num_tokens as f64 + 1.0) / 2.0);
        self.left_s -= self.token_s * num_tokens as f64 + self.pair_s * pairs;
        self.num_granted = self.num_granted.saturating_sub(num_tokens);
        self.num_tokens = if num_tokens < wanted { 0 } else { self.num_tokens - num_tokens };
        num_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_bounded_by_count_and_by_cost() {
        assert_eq!(PrefillBudget::from(5).fit(1_000, 9), 5);
        assert_eq!(PrefillBudget::from(usize::MAX).fit(0, 9), 9);
        // 10 ms of 1 ms each; then of 1 ms and 1 ms more for a context of 1,000.
        let budget = PrefillBudget::new(100, 0, 0.0101, 1e-3, 0.0);
        assert_eq!((budget.fit(0, 50), budget.fit(1_000, 50)), (10, 10));
        let budget = PrefillBudget::new(100, 0, 0.0101, 1e-3, 1e-6);
        assert_eq!((budget.fit(0, 50), budget.fit(1_000, 50)), (10, 5));
        // A block is taken even so, and a token while it is open.
        let mut budget = PrefillBudget::new(100, 4, -1.0, 1e-3, 0.0);
        assert_eq!((budget.take(0, 3), budget.fit(0, 3)), (3, 1));
    }

    #[test]
    fn who_is_cut_short_closes_it() {
        let mut budget = PrefillBudget::new(100, 0, 0.0101, 1e-3, 1e-6);
        assert_eq!((budget.take(0, 5), budget.take(4_000, 50)), (5, 1));
        assert!(!budget.is_open());
        assert_eq!(budget.take(0, 50), 0);
    }

    #[test]
    fn bounds_move_both_ends() {
        let budget = PrefillBudget::from(3);
        assert_eq!(budget.bounded(16, 100).fit(0, 50), 16);
        assert_eq!(budget.bounded(16, 0).fit(0, 50), 0);
    }
}
