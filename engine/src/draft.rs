//! Owns speculation without a second model: draft tokens by prompt lookup (a sequence goes on as it did where its
//! last tokens stood before, in prompt or output), and whether checking them pays.
//!
//! Invariant: a draft changes how many tokens a step yields, never which. Its tokens are computed as
//! further rows of the step, so row `i` holds the logits after the sequence and its first `i` drafts.
//! The engine takes these rows in order. From each it samples the next token as it always does: from the
//! same logits, with penalties and bans of the tokens before it, with the draw of the same key. It goes on
//! to the next row only if that token is the one that the row was computed for; later rows are dropped.
//! So every token is the one that would have been sampled without a draft, for every seed, as far as the
//! runner's bits of a row don't depend on the rows beside it. This implies the usual rule for a draft that
//! is certain of itself: token `x` is kept with probability `p(x)`, else the token follows `p` without `x`.
//!
//! Must not know: the pool, the plan, other sequences.

/// Tokens that must have stood together before: the longest first, which errs less often.
const NGRAM_LENS: [usize; 2] = [3, 2];
/// Weight of the newest draft token in the rate of accepted ones: what counts is whether the sequence repeats
/// something now.
const RATE: f64 = 0.2;

/// Drafts what a sequence says next. Allocates once.
#[derive(Debug, Default)]
pub struct Drafter {
    /// Position of the token after the newest occurrence of an n-gram, by the n-gram's hash; 0 is none.
    /// Where two n-grams have one slot, the newer one stays: a reader compares the tokens.
    followers: Vec<u32>,
    /// Tokens read.
    num_read: usize,
    /// Position of the token that is expected to come again; 0 is none.
    source: usize,
    /// How often the expected token came, lately. Every token is compared, drafted or not, so nothing
    /// has to be tried to learn that it would pay.
    acceptance: f64,
}

impl Drafter {
    /// Takes note of the tokens after those it knows. `tokens` is the whole sequence, which will never
    /// be longer than `max_num_tokens`.
    pub fn read(&mut self, tokens: &[u32], max_num_tokens: usize) {
        // A prompt is not what the model says: it is no measure.
        let is_prompt = self.followers.is_empty();
        if is_prompt {
            self.followers = vec![0; (max_num_tokens * NGRAM_LENS.len()).next_power_of_two()];
        }
        for len in self.num_read + 1..=tokens.len() {
            let tokens = &tokens[..len];
            let is_right = self.source > 0 && tokens[self.source] == tokens[len - 1];
            if self.source > 0 && !is_prompt {
                self.acceptance += RATE * (f64::from(u8::from(is_right)) - self.acceptance);
            }
            let found = self.note_ngrams(tokens);
            // A match that goes on is the longest one.
            self.source = if is_right { self.source + 1 } else { found };
        }
        self.num_read = tokens.len();
    }

    /// Records what `tokens` end with; returns the position after where that stood before, or 0.
    fn note_ngrams(&mut self, tokens: &[u32]) -> usize {
        let mut found = 0;
        for num_tokens in NGRAM_LENS.into_iter().filter(|&num_tokens| num_tokens <= tokens.len()) {
            let ngram = &tokens[tokens.len() - num_tokens..];
            let slot = hash(ngram) as usize & (self.followers.len() - 1);
            let follower = std::mem::replace(&mut self.followers[slot], tokens.len() as u32) as usize;
            // An n-gram that shares its slot with the one before finds the end itself.
            let is_before = (num_tokens..tokens.len()).contains(&follower);
            if found == 0 && is_before && tokens[follower - num_tokens..follower] == *ngram {
                found = follower;
            }
        }
        found
    }

    /// How many tokens to draft, at most `most`: those whose chance to be reached and right is above
    /// `price`.
    pub fn num_tokens(&self, price: f64, most: usize) -> usize {
        let most = if self.source > 0 { most } else { 0 };
        let mut chance = 1.0;
        let pays = |_: &usize| {
            chance *= self.acceptance;
            chance > price
        };
        (0..most).take_while(pays).count()
    }

    /// The draft, without an end; `tokens` are those that were read. Empty if nothing is expected.
    pub fn draft<'a>(&self, tokens: &'a [u32]) -> impl Iterator<Item = u32> + 'a {
        // After the sequence's end, the draft is what it repeats.
        let repeated = if self.source > 0 { &tokens[self.source..] } else { &[] };
        repeated.iter().copied().cycle()
    }
}

/// FNV-1a over the ids, then mixed: its low bits are those of the last id.
fn hash(ngram: &[u32]) -> u64 {
    let hash = ngram.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &token| {
        (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3)
    });
    hash ^ (hash >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use counting_allocator::num_allocations;

    /// After a prompt, then one token at a time.
    fn drafter(prompt: &[u32], output: &[u32]) -> (Drafter, Vec<u32>) {
        let mut drafter = Drafter::default();
        let mut tokens = prompt.to_vec();
        drafter.read(&tokens, 1000);
        for &token in output {
            tokens.push(token);
            drafter.read(&tokens, 1000);
        }
        (drafter, tokens)
    }

    fn draft(prompt: &[u32], output: &[u32], num_tokens: usize) -> Vec<u32> {
        let (drafter, tokens) = drafter(prompt, output);
        drafter.draft(&tokens).take(num_tokens).collect()
    }

    #[test]
    fn the_longest_then_the_newest_match_is_repeated() {
        assert_eq!(draft(&[5, 6, 7, 8, 9, 1, 6, 7], &[], 3), [8, 9, 1]);
        // The three tokens stood once; the last two of them stood again, later.
        assert_eq!(draft(&[5, 6, 7, 8, 9, 6, 7, 4, 5, 6, 7], &[], 2), [8, 9]);
        assert_eq!(draft(&[6, 7, 8, 9, 6, 7, 4, 5, 6, 7], &[], 2), [4, 5]);
        assert_eq!(draft(&[1, 2, 3, 4], &[], 2), [0u32; 0]);
        assert_eq!(draft(&[1, 1], &[], 2), [0u32; 0]);
    }

    #[test]
    fn a_match_that_goes_on_is_kept_and_a_period_goes_on_past_the_end() {
        // Output follows the prompt's first part, though 3, 4 stood again later, before something else.
        assert_eq!(draft(&[1, 2, 3, 4, 5, 6, 9, 3, 4, 8, 8], &[1, 2, 3, 4], 2), [5, 6]);
        assert_eq!(draft(&[1, 2, 3, 1, 2, 3, 1, 2], &[], 7), [3, 1, 2, 3, 1, 2, 3]);
        assert_eq!(draft(&[7, 7, 7], &[], 4), [7; 4]);
    }

    #[test]
    fn drafts_grow_with_what_was_right_and_stop_with_what_was_wrong() {
        let text: Vec<u32> = (1..=60).collect();
        let lengths = |output: &[u32]| drafter(&text, output).0.num_tokens(0.3, 8);
        // The prompt itself repeats nothing, and the first tokens prove nothing yet.
        assert_eq!(lengths(&[1, 2]), 0);
        let growth: Vec<usize> = (2..=30).map(|len| lengths(&text[..len])).collect();
        assert!(growth.is_sorted() && growth[28] == 8, "{growth:?}");
        let wrong: Vec<u32> = (0..20).flat_map(|i| [i + 1, i + 2, 500 + i]).collect();
        assert_eq!(lengths(&wrong), 0);
        assert_eq!(drafter(&text, &text[..30]).0.num_tokens(1.0, 8), 0, "at this price nothing pays");
    }

    #[test]
    fn n_grams_that_share_a_slot_do_not_find_themselves() {
        for salt in 0..500 {
            let mut drafter = Drafter::default();
            let tokens: Vec<u32> = (0..16).map(|i| salt * 16 + i).collect();
            (1..=16).for_each(|len| drafter.read(&tokens[..len], 16));
            assert_eq!(drafter.draft(&tokens).next(), None, "{tokens:?} repeats nothing");
        }
    }

    #[test]
    fn a_token_is_read_in_place() {
        let tokens: Vec<u32> = (0..900).map(|i| i * i % 89).collect();
        let mut drafter = Drafter::default();
        drafter.read(&tokens[..1], 1000);
        let count = num_allocations(|| {
            (2..=tokens.len()).for_each(|len| drafter.read(&tokens[..len], 1000));
            drafter.draft(&tokens).take(5).count()
        });
        assert_eq!(count, 0);
        assert_eq!(drafter.followers.len(), 2048);
    }
}
