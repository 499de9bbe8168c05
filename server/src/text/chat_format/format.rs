//! Owns the seam between a conversation and the ways to write it.
//!
//! Invariant: special tokens are found by name in the manifest, and only there.

use std::fmt::Debug;

use glm_engine::model::manifest::Chat;

use super::message::Role;
use crate::text::TextError;
use crate::text::tokenizer::Tokenizer;

/// One way in which turns become ids.
pub(super) trait Format: Debug + Send + Sync {
    /// Appends the turns, up to where the assistant's reply begins.
    fn encode(
        &self,
        turns: &[(Role, &str)],
        tokenizer: &Tokenizer,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError>;

    /// What the model writes before each reply and no client wants to see.
    fn reply_prefix(&self) -> &'static str {
        ""
    }
}

/// The ids of the special tokens that a manifest lists.
pub(super) struct Specials<'a>(pub(super) &'a Chat);

impl Specials<'_> {
    pub(super) fn id(&self, token: &str) -> Result<u32, TextError> {
        self.0.special_tokens.get(token).copied().ok_or_else(|| TextError::ChatFormat {
            format: self.0.format.clone(),
            message: format!("chat.special_tokens of the manifest lacks {token}"),
        })
    }

    pub(super) fn ids(&self, tokens: &[&str]) -> Result<Vec<u32>, TextError> {
        tokens.iter().map(|token| self.id(token)).collect()
    }
}
