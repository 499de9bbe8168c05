//! Owns the way from ids to text, one id at a time.
//!
//! Invariant: what is emitted is whole characters, and all of it together equals what sentencepiece
//! decodes from all ids at once: one U+FFFD for each byte that is part of no character, valid
//! neighbours kept.

use std::sync::Arc;

use super::vocabulary::{Piece, Vocabulary};

/// Turns ids into text. Holds back at most three bytes of a character that is not complete.
#[derive(Debug)]
pub struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    pending: Vec<u8>,
    at_segment_start: bool,
}

impl Detokenizer {
    /// Starts at the beginning of a segment.
    pub fn new(vocabulary: Arc<Vocabulary>) -> Self {
        Self { vocabulary, pending: Vec::with_capacity(16), at_segment_start: true }
    }

    /// Appends to `text` what `id` completes. A special id ends the segment.
    pub fn push(&mut self, id: u32, text: &mut String) {
        match self.vocabulary.piece(id) {
            Piece::Special => {
                self.pending.drain(..).for_each(|_| text.push(char::REPLACEMENT_CHARACTER));
                self.at_segment_start = true;
            }
            Piece::Text { bytes, word_start } => {
                // sentencepiece put this space there when it encoded the segment.
                let skip = usize::from(self.at_segment_start && *word_start);
                self.at_segment_start = false;
                self.pending.extend_from_slice(&bytes[skip..]);
                take_characters(&mut self.pending, text);
            }
        }
    }

    /// Appends one U+FFFD for each byte that is left.
    pub fn finish(&mut self, text: &mut String) {
        self.pending.drain(..).for_each(|_| text.push(char::REPLACEMENT_CHARACTER));
    }
}

/// Moves all characters and invalid bytes from `bytes` to `text`; leaves the start of a character.
fn take_characters(bytes: &mut Vec<u8>, text: &mut String) {
    let mut len = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        len += chunk.valid().len();
        let is_last = len + chunk.invalid().len() == bytes.len();
        let incomplete = || std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
        if is_last && incomplete() {
            break;
        }
        chunk.invalid().iter().for_each(|_| text.push(char::REPLACEMENT_CHARACTER));
        len += chunk.invalid().len();
    }
    bytes.drain(..len);
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use glm_engine::model::manifest::PieceKind;

    use super::*;

    /// Ids 0 to 255 are bytes; the others as given.
    fn detokenizer(pieces: &[&str]) -> Detokenizer {
        let mut vocab: HashMap<String, u32> = (0..256).map(|b| (format!("<0x{b:02X}>"), b)).collect();
        vocab.extend(pieces.iter().zip(256..).map(|(p, id)| (p.to_string(), id)));
        Detokenizer::new(Arc::new(Vocabulary::new(&vocab, PieceKind::Sentencepiece, &[])))
    }

    fn decode(pieces: &[&str], ids: &[u32]) -> String {
        let mut detokenizer = detokenizer(pieces);
        let mut text = String::new();
        ids.iter().for_each(|id| detokenizer.push(*id, &mut text));
        detokenizer.finish(&mut text);
        text
    }

    /// sentencepiece's own rule, written the slow way: a character here, or one bad byte.
    fn reference(mut bytes: &[u8]) -> String {
        let mut text = String::new();
        while !bytes.is_empty() {
            let len = (1..=bytes.len().min(4)).find(|len| std::str::from_utf8(&bytes[..*len]).is_ok());
            match len {
                Some(len) => text.push_str(std::str::from_utf8(&bytes[..len]).unwrap()),
                None => text.push(char::REPLACEMENT_CHARACTER),
            }
            bytes = &bytes[len.unwrap_or(1)..];
        }
        text
    }

    #[test]
    fn bytes_of_a_text_give_the_text_and_never_half_a_character() {
        for sample in ["你好👋！", "a👩‍👩‍👧‍👦b", "é\u{301}", "𝒳 = 1"] {
            let mut detokenizer = detokenizer(&[]);
            let mut text = String::new();
            for (i, byte) in sample.bytes().enumerate() {
                detokenizer.push(u32::from(byte), &mut text);
                let whole = (0..=i + 1).rev().find(|end| sample.is_char_boundary(*end)).unwrap();
                assert_eq!(text, sample[..whole], "after byte {i} of {sample}");
            }
        }
    }

    #[test]
    fn any_bytes_in_any_split_decode_as_sentencepiece_does() {
        // Few values that matter, so that random bytes often form characters and broken ones.
        let alphabet = [0x41, 0x80, 0xA0, 0xBF, 0xC3, 0xE4, 0xED, 0xF0, 0x9F, 0x98, 0xBD, 0xF4, 0xFF, 0xC0];
        let mut state = 7_u64;
        for round in 0..20_000 {
            let mut ids = Vec::new();
            for _ in 0..12 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ids.push(alphabet[(state >> 33) as usize % alphabet.len()]);
            }
            let bytes: Vec<u8> = ids.iter().map(|id| *id as u8).collect();
            assert_eq!(decode(&[], &ids), reference(&bytes), "round {round}: {bytes:02X?}");
        }
    }

    #[test]
    fn one_leading_space_of_a_segment_is_dropped_unless_it_is_a_byte() {
        let pieces = ["▁", "▁a", "▁▁b", "<s>"];
        assert_eq!(decode(&pieces, &[256, 257]), " a");
        assert_eq!(decode(&pieces, &[258]), " b");
        assert_eq!(decode(&pieces, &[0x20, 257]), "  a");
        assert_eq!(decode(&pieces, &[257, 259, 257]), "aa", "a special token starts a segment");
    }

    #[test]
    fn a_character_cut_by_a_special_token_or_the_end_is_replaced() {
        assert_eq!(decode(&["<s>", "好"], &[0xE4, 0xBD, 256, 257]), "\u{FFFD}\u{FFFD}好");
        assert_eq!(decode(&["<s>", "好"], &[0xE4, 0xBD, 257]), "\u{FFFD}\u{FFFD}好");
        assert_eq!(decode(&[], &[0xF0, 0x9F, 0x98]), "\u{FFFD}\u{FFFD}\u{FFFD}");
    }
}
