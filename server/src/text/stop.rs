//! Owns the search for stop strings in a text that arrives in parts.
//!
//! Invariant: the result does not depend on how the text is cut: it ends before the stop string
//! that is complete first where one may be, and nothing that might still become one has been emitted.

/// Looks for stop strings.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    /// Bytes of `held` in which no stop string may end.
    num_exempt: usize,
}

impl StopMatcher {
    /// Looks for any of `stops`, none of which is empty.
    pub fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self { stops, held: String::new(), num_exempt: 0 }
    }

    /// Takes more text, in which a stop string may end or not, and appends to `out` what is certain.
    /// Returns whether a stop string was found; then the reply has ended.
    pub fn push(&mut self, text: &str, may_stop: bool, out: &mut String) -> bool {
        if self.stops.is_empty() {
            out.push_str(text);
            return false;
        }
        self.held.push_str(text);
        if !may_stop {
            self.num_exempt = self.held.len();
        }
        // The first to be complete; of several that end there, the longest.
        if let Some((_, start)) = self.stops.iter().filter_map(|stop| self.find(stop)).min() {
            out.push_str(&self.held[..start]);
            self.held.clear();
            return true;
        }
        let certain = self.held.len() - self.held_back();
        out.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        self.num_exempt = self.num_exempt.saturating_sub(certain);
        false
    }

    /// Appends to `out` what was held back, as no more text comes.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&std::mem::take(&mut self.held));
    }

    /// End and start of the first `stop` that may be one.
    fn find(&self, stop: &str) -> Option<(usize, usize)> {
        let from = self.held.ceil_char_boundary((self.num_exempt + 1).saturating_sub(stop.len()));
        let start = from + self.held[from..].find(stop)?;
        Some((start + stop.len(), start))
    }

    /// Length of the longest suffix that may become a stop string.
    fn held_back(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        (from..self.held.len())
            .filter(|start| self.held.is_char_boundary(*start))
            .map(|start| &self.held[start..])
            .find(|rest| self.stops.iter().any(|stop| stop.len() > rest.len() && stop.starts_with(rest)))
            .map_or(0, str::len)
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
}
