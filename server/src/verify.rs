//! Owns the comparison of what a machine computes with what was recorded when its model was exported.

use std::path::Path;

use glm_engine::model::known_answer::{Agreement, KnownAnswer, Mismatch};
use glm_engine::runner::{self, ModelRunner};
use glm_engine::{LoadError, Manifest, RunError};

/// Why a runner is not to be trusted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VerifyError {
    /// The file can't be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The runner failed on the prompt.
    #[error("the model fails on the prompt of its known answer: {0}")]
    Run(#[from] RunError),
    /// The runner computes something else.
    #[error("this machine computes something else than what was exported: {0}")]
    Mismatch(#[from] Mismatch),
}

/// Compares what `runner` computes with what was recorded when the folder `dir` was exported; `None`
/// where nothing was. Overwrites the cache.
///
/// # Errors
/// [`VerifyError`]: it differs, or can't be compared.
pub(crate) fn verify(
    runner: &mut impl ModelRunner,
    dir: &Path,
    manifest: &Manifest,
) -> Result<Option<Agreement>, VerifyError> {
    let Some(known) = KnownAnswer::load(dir, manifest)? else { return Ok(None) };
    let logits = runner::logits(runner, &known.token_ids, known.token_ids.len())?;
    Ok(Some(known.compare(logits.view(), manifest.geometry.vocab_size)?))
}
