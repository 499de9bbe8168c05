//! Owns the model as the server sees it: its manifest, tokenizer, chat format and names.

use glm_engine::Manifest;

use crate::text::TextError;
use crate::text::chat_format::ChatFormat;
use crate::text::tokenizer::Tokenizer;

/// The model's side of the server.
#[derive(Debug)]
pub struct ServedModel {
    /// What the exporter said.
    pub manifest: Manifest,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat format.
    pub chat: ChatFormat,
    /// Names that requests may use; the first is the manifest's.
    pub names: Vec<String>,
    /// Names the exact model in every answer.
    pub fingerprint: String,
}

impl ServedModel {
    /// Reads the tokenizer of the folder `dir`; `aliases` are names besides the manifest's.
    ///
    /// # Errors
    /// [`TextError`]: the tokenizer or the chat format can't be used.
    pub fn load(dir: &std::path::Path, manifest: Manifest, aliases: &[String]) -> Result<Self, TextError> {
        let mut names = vec![manifest.model.name.clone()];
        for alias in aliases.iter().map(|alias| alias.trim()).filter(|alias| !alias.is_empty()) {
            if !names.iter().any(|name| name == alias) {
                names.push(alias.to_owned());
            }
        }
        let digest = manifest.digest.rsplit(':').next().unwrap_or_default();
        Ok(Self {
            tokenizer: Tokenizer::load(dir, &manifest)?,
            chat: ChatFormat::new(&manifest.chat)?,
            fingerprint: format!("fp_{}", digest.chars().take(12).collect::<String>()),
            names,
            manifest,
        })
    }
}
