//! Owns the way of one reply from ids to the text a client sees: detokenise, strip the format's
//! prefix, look for stop strings.
//!
//! Invariant: the concatenated text does not depend on who reads it or how.

use super::detokenizer::Detokenizer;
use super::stop::StopMatcher;

/// The text side of one reply.
#[derive(Debug)]
pub struct ReplyText {
    detokenizer: Detokenizer,
    /// What is left of the prefix that the chat format puts before each reply.
    prefix: &'static str,
    stop: StopMatcher,
    /// Tokens in whose text no stop string ends.
    min_tokens: usize,
    num_tokens: usize,
    raw: String,
}

/// What one step of a reply gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplyStep {
    /// Text for the client; may be empty.
    pub text: String,
    /// Whether a stop string ended the reply.
    pub stopped: bool,
}

impl ReplyText {
    /// Strips as much of `prefix` as the reply begins with; no stop string ends in what the first
    /// `min_tokens` tokens say.
    pub fn new(detokenizer: Detokenizer, prefix: &'static str, stop: StopMatcher, min_tokens: usize) -> Self {
        Self { detokenizer, prefix, stop, min_tokens, num_tokens: 0, raw: String::new() }
    }

    /// Takes one generated id.
    pub fn push(&mut self, id: u32) -> ReplyStep {
        self.detokenizer.push(id, &mut self.raw);
        self.num_tokens += 1;
        self.step()
    }

    /// Takes the end: nothing is held back any more.
    pub fn finish(&mut self) -> ReplyStep {
        self.detokenizer.finish(&mut self.raw);
        let mut step = self.step();
        if !step.stopped {
            self.stop.finish(&mut step.text);
        }
        step
    }

    fn step(&mut self) -> ReplyStep {
        let mut raw = self.raw.as_str();
        // Character by character, as the prefix may come in parts; a reply that leaves the prefix
        // has no more of it.
        while let (Some(expected), Some(found)) = (self.prefix.chars().next(), raw.chars().next()) {
            if expected != found {
                self.prefix = "";
                break;
            }
            self.prefix = &self.prefix[expected.len_utf8()..];
            raw = &raw[found.len_utf8()..];
        }
        let mut text = String::new();
        let stopped = self.stop.push(raw, self.num_tokens > self.min_tokens, &mut text);
        self.raw.clear();
        ReplyStep { text, stopped }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use glm_engine::model::manifest::PieceKind;

    use super::*;
    use crate::text::vocabulary::Vocabulary;

    fn reply(pieces: &[&str], stop: &str) -> (Vec<String>, bool) {
        reply_of(pieces, stop, 0)
    }

    fn reply_of(pieces: &[&str], stop: &str, min_tokens: usize) -> (Vec<String>, bool) {
        let vocab: HashMap<String, u32> = pieces.iter().zip(0..).map(|(p, id)| (p.to_string(), id)).collect();
        let vocabulary = Arc::new(Vocabulary::new(&vocab, PieceKind::Sentencepiece, &[]));
        let stops = if stop.is_empty() { vec![] } else { vec![stop.to_owned()] };
        let stop = StopMatcher::new(stops);
        let mut text = ReplyText::new(Detokenizer::new(vocabulary), "\n ", stop, min_tokens);
        let mut out = Vec::new();
        for id in 0..pieces.len() as u32 {
            let step = text.push(id);
            out.push(step.text);
            if step.stopped {
                return (out, true);
            }
        }
        let last = text.finish();
        out.push(last.text);
        (out, last.stopped)
    }

    #[test]
    fn the_prefix_is_stripped_in_whatever_parts_it_comes() {
        assert_eq!(reply(&["▁", "<0x0A>", "▁你", "好"], "").0.concat(), "你好");
        assert_eq!(reply(&["<0x0A>▁你"], "").0.concat(), "<0x0A> 你");
        assert_eq!(reply(&["<0x0A>", "▁▁x"], "").0.concat(), " x");
        assert_eq!(reply(&["▁x", "<0x0A>", "▁y"], "").0.concat(), "x\n y");
        assert_eq!(reply(&["<0x0A>"], "").0.concat(), "");
    }

    #[test]
    fn each_step_emits_what_it_completes() {
        assert_eq!(reply(&["a", "<0xE4>", "<0xBD>", "<0xA0>"], "").0, ["a", "", "", "你", ""]);
        assert_eq!(reply(&["a", "<0xE4>", "<0xBD>"], "").0, ["a", "", "", "\u{FFFD}\u{FFFD}"]);
    }

    #[test]
    fn stop_strings_span_ids_and_the_flush() {
        assert_eq!(reply(&["a", "b", "c", "d"], "bc"), (vec!["a".into(), "".into(), "".into()], true));
        assert_eq!(reply(&["a", "b"], "bc"), (vec!["a".into(), "".into(), "b".into()], false));
        assert_eq!(reply(&["a", "<0xE4>"], "\u{FFFD}"), (vec!["a".into(), "".into(), "".into()], true));
    }

    #[test]
    fn the_text_of_the_first_tokens_is_not_ended() {
        let reply = |min_tokens| reply_of(&["▁", "<0x0A>", "▁a", "b", "c", "ab", "d"], "ab", min_tokens);
        let text = |parts: &[&str]| parts.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(reply(3), (text(&["", "", "", ""]), true));
        assert_eq!(reply(4), (text(&["", "", "", "ab", "c", ""]), true));
        assert_eq!(reply(6), (text(&["", "", "", "ab", "c", "ab", "d", ""]), false));
        let partial = |min_tokens| reply_of(&["a", "<0xE4>"], "\u{FFFD}", min_tokens).1;
        assert_eq!((partial(1), partial(2)), (true, false), "the flush belongs to the last token");
    }
}
