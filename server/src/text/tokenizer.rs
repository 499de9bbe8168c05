//! Owns the model's tokenizer: text to ids, and the vocabulary for the way back.
//!
//! Invariant: no text, whatever it spells, becomes a special id. Special ids are inserted by the
//! chat format only, so that a user who writes `<|assistant|>` cannot forge a turn.

use std::path::Path;
use std::sync::Arc;

use glm_engine::Manifest;

use super::TextError;
use super::vocabulary::Vocabulary;

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

    /// The bytes of each id.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }
}
