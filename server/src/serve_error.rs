//! Owns why a server ended.

use glm_engine::{LoadError, SequenceError, SubmitError};

use crate::engine_failure::EngineFailure;
use crate::text::TextError;
use crate::verify::VerifyError;

/// Why a model could not be loaded, in words for the person who started the server.
pub type LoadFailure = Box<dyn std::error::Error + Send + Sync>;

/// Why a server ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The sockets failed.
    #[error("HTTP: {0}")]
    Http(#[from] std::io::Error),
    /// The model could not be loaded.
    #[error("{0}")]
    Load(LoadFailure),
    /// The first generation's prompt could not be made.
    #[error("warm-up: {0}")]
    WarmUpText(#[from] TextError),
    /// Not even the first generation fits.
    #[error(
        "a prompt of one word has {num_prompt_tokens} tokens, and a sequence may have {max_model_len}: raise \
         --max-model-len or --kv-cache-memory"
    )]
    NoRoom {
        /// The shortest honest prompt.
        num_prompt_tokens: usize,
        /// The limit.
        max_model_len: usize,
    },
    /// The first generation was refused.
    #[error("warm-up: {0}")]
    WarmUpSubmit(#[from] SubmitError),
    /// The first generation failed.
    #[error("warm-up: {0}")]
    WarmUp(#[from] SequenceError),
    /// The engine failed while it served, in a way that only a new process heals.
    #[error("the engine failed for good: {0}")]
    Engine(#[from] EngineFailure),
    /// The same prompt had two answers.
    #[error("warm-up: a greedy generation gave {first:?}, and then {second:?}")]
    Unsteady {
        /// Tokens of the first.
        first: Vec<u32>,
        /// Tokens of the second.
        second: Vec<u32>,
    },
}

impl ServeError {
    /// Whether the engine, or its device, failed in a way that only a new process heals: the process has to end
    /// with [`crate::ENGINE_FAILED_EXIT_CODE`].
    pub fn is_engine_failure(&self) -> bool {
        match self {
            Self::Engine(_) => true,
            Self::WarmUp(error) => {
                matches!(error, SequenceError::DeviceLost(_) | SequenceError::EngineDied)
            }
            Self::Load(error) => {
                let verified = error.downcast_ref();
                matches!(verified, Some(VerifyError::Run(error)) if error.is_permanent())
                    || matches!(error.downcast_ref(), Some(LoadError::DeviceLost(_)))
            }
            _ => false,
        }
    }
}
