//! Owns why a bench could not measure.

use std::path::PathBuf;

use glmserve_client::ClientError;

/// Why a bench could not measure at all; streams that break are in the report instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The server could not be asked for its models.
    #[error("cannot list the models (name one with --model): {0}")]
    Models(#[source] ClientError),
    /// The server lists no model.
    #[error("the server lists no model")]
    NoModel,
    /// The client could not be made.
    #[error(transparent)]
    Client(ClientError),
    /// The first, smallest request did not work.
    #[error("the first request failed: {0}")]
    FirstRequest(String),
    /// The metrics that were asked for cannot be read.
    #[error("cannot read the metrics: {0}")]
    Metrics(#[source] ClientError),
    /// There is no such process here.
    #[error("process {0} does not tell its memory")]
    Pid(u32),
    /// The JSON report cannot be written.
    #[error("cannot write {path}: {error}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        error: std::io::Error,
    },
}
