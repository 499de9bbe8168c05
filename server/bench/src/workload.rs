//! Owns the prompts of a bench: as many tokens as asked, and no two alike.
//!
//! Invariant: a prompt depends on the seed and its index only, and prompts of different indices differ from
//! their first words on, so that a prefix cache cannot help.

use std::time::Duration;

use glmserve_client::{ChatRequest, Message};

/// Short words that most vocabularies hold as one token each, with the space before them.
const WORDS: [&str; 64] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
];

/// How many tokens a prompt of so many words comes to, as measured with two requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct TokenRate {
    tokens_per_word: f64,
    /// The chat template's part.
    num_fixed_tokens: f64,
}

impl TokenRate {
    /// The word counts of the two requests that measure the rate.
    pub(super) const PROBE_WORDS: [u32; 2] = [16, 144];

    /// One token a word, for a server that does not tell.
    pub(super) const UNKNOWN: Self = Self { tokens_per_word: 1.0, num_fixed_tokens: 0.0 };

    /// The rate from what the probes' prompts came to; nonsense (a server that does not count) is unknown.
    pub(super) fn from_probes(num_tokens: [u64; 2]) -> Self {
        let [few_words, many_words] = Self::PROBE_WORDS.map(f64::from);
        let [few, many] = num_tokens.map(|tokens| tokens as f64);
        let tokens_per_word = (many - few) / (many_words - few_words);
        if !(0.1..=20.0).contains(&tokens_per_word) {
            return Self::UNKNOWN;
        }
        Self { tokens_per_word, num_fixed_tokens: few - few_words * tokens_per_word }
    }

    /// How many words make a prompt of `prompt_tokens`; at least one.
    pub(super) fn num_words(self, prompt_tokens: u32) -> u32 {
        let words = (f64::from(prompt_tokens) - self.num_fixed_tokens) / self.tokens_per_word;
        words.round().max(1.0) as u32
    }
}

/// What every request of a bench has in common.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    pub(super) model: String,
    pub(super) seed: u64,
}

impl Workload {
    /// The request number `index` of the bench, with a prompt of `num_words`.
    pub(super) fn request(&self, index: u64, num_words: u32, max_tokens: u32) -> ChatRequest {
        let mut state = self.seed ^ index.wrapping_mul(0xd134_2543_de82_ef95);
        // A space before the first as well: without it a vocabulary may hold that word as several tokens.
        let words: String = (0..num_words)
            .flat_map(|_| [" ", WORDS[(split_mix(&mut state) % WORDS.len() as u64) as usize]])
            .collect();
        ChatRequest {
            model: self.model.clone(),
            messages: vec![Message::new("user", words)],
            max_tokens: Some(max_tokens),
            temperature: Some(0.0),
            ignore_eos: Some(true),
            ..ChatRequest::default()
        }
    }
}

impl Workload {
    /// How long after the request number `index` the next one arrives: exponential, so that arrivals at
    /// `rate` a second are a Poisson process.
    pub(super) fn gap(&self, index: u64, rate: f64) -> Duration {
        let mut state = !self.seed ^ index.wrapping_mul(0xd134_2543_de82_ef95);
        // As many bits as a double holds exactly; 1 excluded, so the logarithm is finite.
        let fraction = (split_mix(&mut state) >> 11) as f64 / (1_u64 << 53) as f64;
        Duration::from_secs_f64(-(1.0 - fraction).ln() / rate)
    }
}

/// SplitMix64: small, and the same on every machine, so that a seed means the same prompts everywhere.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn prompt(seed: u64, index: u64) -> String {
        let workload = Workload { model: "m".into(), seed };
        workload.request(index, 40, 1).messages[0].content.clone()
    }

    #[test]
    fn prompts_differ_early_and_repeat_by_seed() {
        let starts: HashSet<String> = (0..4)
            .flat_map(|seed| (0..500).map(move |index| prompt(seed, index)))
            .map(|prompt| prompt.split_whitespace().take(8).collect())
            .collect();
        assert_eq!(starts.len(), 2_000, "two prompts share their first eight words");
        assert_eq!(prompt(7, 3), prompt(7, 3));
        assert_eq!(prompt(7, 3).split_whitespace().count(), 40);
        assert!(prompt(7, 3).starts_with(' '));
    }

    #[test]
    fn gaps_are_exponential_and_repeat_by_seed() {
        let workload = Workload { model: "m".into(), seed: 11 };
        let gaps: Vec<f64> = (0..20_000).map(|index| workload.gap(index, 4.0).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        assert!((mean - 0.25).abs() < 0.01, "{mean}");
        // An exponential exceeds its mean with probability 1/e.
        let longer = gaps.iter().filter(|&&gap| gap > 0.25).count() as f64 / gaps.len() as f64;
        assert!((longer - (-1.0_f64).exp()).abs() < 0.015, "{longer}");
        assert_eq!(workload.gap(3, 4.0), workload.gap(3, 4.0));
    }

    #[test]
    fn the_rate_finds_the_word_count_for_a_prompt_length() {
        // 1.25 tokens a word and a template of 9 tokens.
        let rate = TokenRate::from_probes([29, 189]);
        assert_eq!(rate.num_words(134), 100);
        assert_eq!(rate.num_words(3), 1, "shorter than the template is still a prompt");
        assert_eq!(TokenRate::from_probes([0, 0]), TokenRate::UNKNOWN);
        assert_eq!(TokenRate::from_probes([20, 4]), TokenRate::UNKNOWN);
        assert_eq!(TokenRate::UNKNOWN.num_words(128), 128);
    }
}
