//! Owns the model's tokenizer: text to ids, and the vocabulary for the way back.
//!
//! Invariant: no text, whatever it spells, becomes a special id. Special ids are inserted by the
//! chat format only, so that a user who writes `<|assistant|>` cannot forge a turn.

use std::path::Path;
use std::sync::Arc;

use glm_engine::Manifest;

use super::TextError;
use super::vocabulary::Vocabulary;

/// How much of a text is tokenised before it is decided whether to go on.
const PART_BYTES: usize = 16 * 1024;

/// A loaded tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    encoder: tokenizers::Tokenizer,
    vocabulary: Arc<Vocabulary>,
}

impl Tokenizer {
    /// Loads the tokenizer that the manifest of `dir` names.
    ///
    /// # Errors
    /// [`TextError::Load`] also where the file registers special tokens.
    pub fn load(dir: &Path, manifest: &Manifest) -> Result<Self, TextError> {
        let path = dir.join(&manifest.tokenizer.file);
        let fail = |message: String| TextError::Load { path: path.clone(), message };
        let mut encoder = tokenizers::Tokenizer::from_file(&path).map_err(|e| fail(e.to_string()))?;
        if !encoder.get_added_vocabulary().is_empty() {
            return Err(fail(
                "it registers special tokens, which users could then write; export it again".into(),
            ));
        }
        let vocab = encoder.get_vocab(false);
        let num_rows = manifest.geometry.padded_vocab_size;
        if let Some((piece, id)) = vocab.iter().find(|(_, id)| **id as usize >= num_rows) {
            return Err(fail(format!("{piece:?} has the id {id}, and the model has {num_rows} rows")));
        }
        // A file may ask for either; both would change what a prompt says.
        encoder.with_padding(None);
        encoder.with_truncation(None).map_err(|e| fail(e.to_string()))?;
        let special_ids: Vec<u32> =
            manifest.chat.special_tokens.values().chain(&manifest.stop_token_ids).copied().collect();
        let vocabulary = Vocabulary::new(&vocab, manifest.tokenizer.pieces, &special_ids);
        Ok(Self { encoder, vocabulary: Arc::new(vocabulary) })
    }

    /// Appends the ids of `text` to `ids`. CPU work in proportion to the text.
    ///
    /// # Errors
    /// [`TextError::Encode`]: the tokenizer gave up.
    pub fn encode_into(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TextError> {
        let encoding = self.encoder.encode_fast(text, false).map_err(|e| TextError::Encode(e.to_string()))?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// Whether `texts` have far more than `limit` tokens; if so, how many they have at least, with a wide
    /// margin. It reads no more of them than it takes to know, so that a refusal costs what a prompt does that
    /// is taken. Where it cuts a text a token more may arise than the whole has: hence the margin.
    ///
    /// # Errors
    /// [`TextError::Encode`]: the tokenizer gave up.
    pub fn exceeds<'a>(
        &self,
        texts: impl IntoIterator<Item = &'a str>,
        limit: usize,
    ) -> Result<Option<usize>, TextError> {
        let (mut num_tokens, mut ids) = (0, Vec::new());
        for mut rest in texts {
            while !rest.is_empty() {
                let (part, after) = rest.split_at(rest.floor_char_boundary(PART_BYTES));
                ids.clear();
                self.encode_into(part, &mut ids)?;
                num_tokens += ids.len();
                if num_tokens > 2 * limit {
                    return Ok(Some(num_tokens / 2));
                }
                rest = after;
            }
        }
        Ok(None)
    }

    /// The bytes of each id.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    #[test]
    fn far_too_long_texts_are_not_read_to_their_end() {
        let folder = fixtures::chatglm3();
        let tokenizer = Tokenizer::load(folder.path(), &folder.manifest()).unwrap();
        let long = "x".repeat(3 * PART_BYTES);
        let texts = [long.as_str()].into_iter().chain(std::iter::once_with(|| panic!("read on")));
        let least = tokenizer.exceeds(texts, 100).unwrap().unwrap();
        assert!((101..=PART_BYTES).contains(&least), "{least}");
        // A token for each letter, and one for the start of each text.
        assert_eq!(tokenizer.exceeds(["abc", "de"], 100).unwrap(), None);
        assert_eq!(tokenizer.exceeds([long.as_str()], 2 * PART_BYTES).unwrap(), None);
    }
}
