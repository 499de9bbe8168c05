//! Everything between messages and token ids, and between token ids and text. Synchronous and pure:
//! no HTTP, no channel, no clock.

pub mod chat_format;
pub mod detokenizer;
pub mod reply;
pub mod stop;
pub mod tokenizer;
pub mod vocabulary;

use std::path::PathBuf;

/// Why text could not be turned into ids.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The tokenizer file is missing, damaged or unsafe.
    #[error("cannot use the tokenizer {path}: {message}")]
    Load {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The manifest's chat format is unknown or lacks a token.
    #[error("chat format {format}: {message}")]
    ChatFormat {
        /// Its name in the manifest.
        format: String,
        /// What is wrong.
        message: String,
    },
    /// A base model, which has no chat format.
    #[error(
        "this is a base model: it goes on with a text and has no chat format (`chat` in glm_export.json \
         gives it one at export)"
    )]
    NoChat,
    /// The chat format has no way to say this.
    #[error("messages[{index}]: {message}")]
    Conversation {
        /// Position of the message that does not fit.
        index: usize,
        /// What would.
        message: &'static str,
    },
    /// The tokenizer failed on a text.
    #[error("the tokenizer failed: {0}")]
    Encode(String),
}
