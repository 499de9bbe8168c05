//! Owns the search for stop strings in a text that arrives in parts.
//!
//! Invariant: the result does not depend on how the text is cut: it ends before the stop string
//! that is complete first where one may be, and nothing that might still become one has been emitted.
//! The work is in proportion to the text and the number of stop strings, not to their lengths.

/// Looks for stop strings.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    held: String,
}

/// A stop string, and how far the text has come in it (the algorithm of Knuth, Morris and Pratt).
#[derive(Debug)]
struct Stop {
    text: Box<[u8]>,
    /// For each number of bytes that the text ends with: how many are left if the next one is another.
    shorter: Box<[u32]>,
    /// The text ends with so many bytes of the stop string, but never with all of them.
    num_matched: usize,
}

impl Stop {
    fn new(text: String) -> Self {
        let text = text.into_bytes().into_boxed_slice();
        let mut shorter = vec![0; text.len() + 1].into_boxed_slice();
        let mut matched = 0;
        for end in 1..text.len() {
            while matched > 0 && text[matched] != text[end] {
                matched = shorter[matched] as usize;
            }
            matched += usize::from(text[matched] == text[end]);
            shorter[end + 1] = matched as u32;
        }
        Self { text, shorter, num_matched: 0 }
    }

    /// Takes the next byte of the text; returns whether the stop string ends there.
    fn push(&mut self, byte: u8) -> bool {
        while self.num_matched > 0 && self.text[self.num_matched] != byte {
            self.num_matched = self.shorter[self.num_matched] as usize;
        }
        self.num_matched += usize::from(self.text[self.num_matched] == byte);
        let is_complete = self.num_matched == self.text.len();
        if is_complete {
            self.num_matched = self.shorter[self.num_matched] as usize;
        }
        is_complete
    }
}

impl StopMatcher {
    /// Looks for any of `stops`, none of which is empty.
    pub fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self { stops: stops.into_iter().map(Stop::new).collect(), held: String::new() }
    }

    /// Takes more text, in which a stop string may end or not, and appends to `out` what is certain.
    /// Returns whether a stop string was found; then the reply has ended.
    pub fn push(&mut self, text: &str, may_stop: bool, out: &mut String) -> bool {
        if self.stops.is_empty() {
            out.push_str(text);
            return false;
        }
        let num_held = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            // All of them take the byte. Of several that end here, the longest counts.
            let complete =
                self.stops.iter_mut().filter_map(|stop| stop.push(byte).then_some(stop.text.len()));
            if let Some(len) = complete.max().filter(|_| may_stop) {
                out.push_str(&self.held[..num_held + i + 1 - len]);
                self.held.clear();
                return true;
            }
        }
        let num_held_back = self.stops.iter().map(|stop| stop.num_matched).max().unwrap_or(0);
        let certain = self.held.len() - num_held_back;
        out.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        false
    }

    /// Appends to `out` what was held back, as no more text comes.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&std::mem::take(&mut self.held));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `parts`, of which the first `num_exempt` may not end the text; returns the text, whether it
    /// stopped, and how much was ready before the end.
    fn run_after(num_exempt: usize, stops: &[&str], parts: &[&str]) -> (String, bool, usize) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect());
        let mut out = String::new();
        for (index, part) in parts.iter().enumerate() {
            if matcher.push(part, index >= num_exempt, &mut out) {
                let ready = out.len();
                return (out, true, ready);
            }
        }
        let ready = out.len();
        matcher.finish(&mut out);
        (out, false, ready)
    }

    fn run(stops: &[&str], parts: &[&str]) -> (String, bool, usize) {
        run_after(0, stops, parts)
    }

    #[test]
    fn every_split_gives_the_same_text() {
        let cases: [(&[&str], &str, &str, bool); 7] = [
            (&["END"], "abENDcd", "ab", true),
            (&["END"], "abENcd", "abENcd", false),
            (&["aab"], "aaab", "a", true),
            (&["。", "好👋"], "你好👋。", "你", true),
            (&["好👍"], "你好👋", "你好👋", false),
            (&["bcd", "c"], "abcd", "ab", true),
            (&["\n\n", "x"], "a\n\n", "a", true),
        ];
        for (stops, text, expected, stopped) in cases {
            let chars: Vec<usize> = text.char_indices().map(|(i, _)| i).skip(1).collect();
            for mask in 0..1_u32 << chars.len() {
                let mut parts = Vec::new();
                let mut start = 0;
                for (bit, at) in chars.iter().enumerate() {
                    if mask >> bit & 1 == 1 {
                        parts.push(&text[start..*at]);
                        start = *at;
                    }
                }
                parts.push(&text[start..]);
                let (out, found, _) = run(stops, &parts);
                assert_eq!((out.as_str(), found), (expected, stopped), "{stops:?} in {parts:?}");
            }
        }
    }

    #[test]
    fn a_stop_string_may_begin_but_not_end_in_the_exempt_parts() {
        let cases = [
            (1, vec!["b"], vec!["abc", "abc"], "abca", true),
            (2, vec!["b"], vec!["abc", "abc"], "abcabc", false),
            (1, vec!["bc"], vec!["ab", "cd"], "a", true),
            (2, vec!["bc"], vec!["ab", "cd", "bc"], "abcd", true),
            (3, vec!["bcd", "c"], vec!["a", "b", "c", "d"], "a", true),
            (3, vec!["aa"], vec!["a", "a", "a", "a"], "aa", true),
            (2, vec!["好好"], vec!["你好", "好", "好", "!"], "你好", true),
            (2, vec!["好", "你好"], vec!["你", "好", "吗"], "你好吗", false),
        ];
        for (num_exempt, stops, parts, expected, stopped) in cases {
            let (out, found, _) = run_after(num_exempt, &stops, &parts);
            assert_eq!((out.as_str(), found), (expected, stopped), "{stops:?} in {parts:?}");
        }
        assert_eq!(run_after(1, &["b", "bcd"], &["ab"]).2, 1, "the longer one may come");
        assert_eq!(run_after(1, &["b"], &["ab"]).2, 2, "nothing may");
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held_back() {
        assert_eq!(run(&["END"], &["abc"]).2, 3);
        assert_eq!(run(&["END"], &["abE"]).2, 2);
        assert_eq!(run(&["END"], &["abEN", "E"]).2, 4);
        assert_eq!(run(&[], &["abE"]).2, 3);
    }

    /// The search as its definition says it, on the whole text: where a stop string ends first, the longest
    /// of those that end there.
    fn reference<'a>(stops: &[&str], text: &'a str) -> (&'a str, bool) {
        for end in 1..=text.len() {
            let found = stops.iter().filter(|stop| text.as_bytes()[..end].ends_with(stop.as_bytes()));
            if let Some(len) = found.map(|stop| stop.len()).max() {
                return (&text[..end - len], true);
            }
        }
        (text, false)
    }

    #[test]
    fn many_stop_strings_that_overlap_are_found_as_the_definition_says() {
        let mut state = 1_u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        for round in 0..3000 {
            // Two letters and a character of three bytes: matches that fail late are common.
            let mut word = |max: usize| -> String {
                (0..=random(max)).map(|_| ["a", "b", "好"][random(9).min(2) % 3]).collect()
            };
            let stops: Vec<String> = (0..8).map(|_| word(12) + "ab").collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let parts: Vec<String> = (0..12).map(|_| word(6)).collect();
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            let text = parts.concat();
            let (out, stopped, _) = run(&stops, &parts);
            assert_eq!(
                (out.as_str(), stopped),
                reference(&stops, &text),
                "round {round}: {stops:?} in {parts:?}"
            );
        }
    }

    #[test]
    fn no_more_is_held_back_than_may_become_a_stop_string() {
        let long = "a".repeat(1000) + "b";
        let (_, stopped, ready) = run(&[&long], &["x", &"a".repeat(5000), "c", "d"]);
        assert_eq!((stopped, ready), (false, 5003));
        let (_, _, ready) = run(&[&long], &["x", &"a".repeat(5000)]);
        assert_eq!(ready, 4001);
    }
}
