//! Owns the search for stop strings in a text that arrives in parts.
//!
//! Invariant: the result does not depend on how the text is cut: it ends before the stop string
//! that is complete first, and nothing that might still become one has been emitted.

/// Looks for stop strings.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    /// Looks for any of `stops`, none of which is empty.
    pub fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self { stops, held: String::new() }
    }

    /// Takes more text and appends to `out` what is certain. Returns whether a stop string was
    /// found; then the reply has ended.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.stops.is_empty() {
            out.push_str(text);
            return false;
        }
        self.held.push_str(text);
        // The first to be complete; of several that end there, the longest.
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop).map(|start| (start + stop.len(), start)))
            .min();
        if let Some((_, start)) = found {
            out.push_str(&self.held[..start]);
            self.held.clear();
            return true;
        }
        let certain = self.held.len() - self.held_back();
        out.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        false
    }

    /// Appends to `out` what was held back, as no more text comes.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&std::mem::take(&mut self.held));
    }

    /// Length of the longest suffix that may become a stop string.
    fn held_back(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        (from..self.held.len())
            .filter(|start| self.held.is_char_boundary(*start))
            .find(|start| self.stops.iter().any(|stop| stop.starts_with(&self.held[*start..])))
            .map_or(0, |start| self.held.len() - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `parts`; returns the text, whether it stopped, and how much was ready before the end.
    fn run(stops: &[&str], parts: &[&str]) -> (String, bool, usize) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect());
        let mut out = String::new();
        for part in parts {
            if matcher.push(part, &mut out) {
                let ready = out.len();
                return (out, true, ready);
            }
        }
        let ready = out.len();
        matcher.finish(&mut out);
        (out, false, ready)
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
    fn only_what_may_become_a_stop_string_is_held_back() {
        assert_eq!(run(&["END"], &["abc"]).2, 3);
        assert_eq!(run(&["END"], &["abE"]).2, 2);
        assert_eq!(run(&["END"], &["abEN", "E"]).2, 4);
        assert_eq!(run(&[], &["abE"]).2, 3);
    }
}
