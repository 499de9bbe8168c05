//! Owns the engine's error types. They name domain facts only; the server maps them to HTTP.

use std::path::PathBuf;
use std::time::Duration;

/// Why admission control refused a request. Nothing was queued.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// A parameter is out of its range.
    #[error("{field}: {message}")]
    InvalidParameter {
        /// The field's name in [`crate::SamplingParams`] or [`crate::Request`].
        field: &'static str,
        /// What is wrong and which values are allowed.
        message: String,
    },
    /// The prompt alone, or with `max_tokens`, can never fit.
    #[error("the request needs {num_tokens} tokens, the limit is {limit}")]
    TooLong {
        /// Prompt tokens plus the tokens that may be generated.
        num_tokens: usize,
        /// The smaller of the model's context and the KV cache.
        limit: usize,
    },
    /// As many requests are running and waiting as the configuration allows, in all or of this tenant.
    #[error("{num_requests} requests are running or waiting, which is the limit")]
    QueueFull {
        /// How many requests are in the engine.
        num_requests: usize,
        /// When a permit is likely to be given back: when the first of those that run is expected to end, at most
        /// 1 s until a reply has ended.
        retry_after: Duration,
    },
    /// The cost model predicts that the first token would come after the request's deadline.
    #[error("the first token is expected in {:.3} s, after the request's deadline", estimate.as_secs_f64())]
    DeadlineUnmeetable {
        /// Predicted time to the first token.
        estimate: Duration,
        /// When the work ahead will have shrunk enough, if nothing is added to it: the estimate less
        /// the deadline, at least 100 ms.
        retry_after: Duration,
    },
    /// By the cost model's estimate, the request can't leave the queue within its limit.
    #[error(
        "the queue is too long: this request would wait about {:.1} s, and it may wait {:.1} s",
        estimate.as_secs_f64(),
        limit.as_secs_f64()
    )]
    QueueTimeUnmeetable {
        /// Predicted time in the queue.
        estimate: Duration,
        /// The request's limit.
        limit: Duration,
        /// When it is expected to be accepted: the estimate less the limit, behind the refused ones that
        /// were told so before; at least 100 ms.
        retry_after: Duration,
    },
    /// The engine is draining or its thread has ended.
    #[error("the engine is not accepting requests: {0}")]
    Unavailable(&'static str),
}

/// Why an accepted sequence could not be finished.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SequenceError {
    /// The runner failed on a step that this sequence was part of.
    #[error("the model failed on this step: {0}")]
    Run(String),
    /// The model produced logits that are not numbers, so nothing can be sampled.
    #[error("the model produced non-finite logits at position {position}")]
    NonFiniteLogits {
        /// Position of the row in the sequence.
        position: usize,
    },
    /// No token of this sequence can be chosen; other sequences are not concerned.
    #[error("no token can be chosen: {0}")]
    CannotSample(&'static str),
    /// The server is shutting down and the drain time is over.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The engine thread ended while this sequence was alive.
    #[error("the engine thread ended unexpectedly")]
    EngineDied,
    /// The device failed in a way that only a new process heals, in the runner's words. The engine thread has
    /// ended.
    #[error("the device that computes has failed, and this process can't use it again")]
    DeviceLost(String),
}

/// A runner's failure on one step. Nothing advanced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RunError {
    /// What failed, in the runner's own words.
    pub message: String,
    /// What it means for the next step.
    pub kind: RunErrorKind,
}

/// What a failure means for the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunErrorKind {
    /// It may succeed.
    Step,
    /// It may succeed if it is smaller.
    OutOfMemory,
    /// No step of this process can succeed any more.
    DeviceLost,
}

impl RunError {
    /// A failure after which the next step may succeed.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), kind: RunErrorKind::Step }
    }

    /// A failure for want of memory.
    pub fn out_of_memory(message: impl Into<String>) -> Self {
        Self { message: message.into(), kind: RunErrorKind::OutOfMemory }
    }

    /// A failure after which no step of this process can succeed.
    pub fn permanent(message: impl Into<String>) -> Self {
        Self { message: message.into(), kind: RunErrorKind::DeviceLost }
    }

    /// Whether every later run of this process would fail as well.
    pub fn is_permanent(&self) -> bool {
        self.kind == RunErrorKind::DeviceLost
    }
}

impl From<RunError> for SequenceError {
    fn from(error: RunError) -> Self {
        match error.kind {
            RunErrorKind::DeviceLost => Self::DeviceLost(error.message),
            RunErrorKind::Step | RunErrorKind::OutOfMemory => Self::Run(error.message),
        }
    }
}

/// Why a model folder could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file of the folder is a link to somewhere else, which ONNX Runtime refuses to follow.
    #[error("{} is a link to {}: the files of a model must lie in its folder (`cp -L` copies them)", path.display(), found.display())]
    LinkOutside {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        found: PathBuf,
    },
    /// A file of the folder can't be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file of the folder is longer or shorter than the manifest says.
    #[error(
        "{path} has {found} bytes, and {wanted} were exported: its copy is not whole, or not of this model"
    )]
    FileSize {
        /// The file.
        path: PathBuf,
        /// Bytes that the manifest says.
        wanted: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// A file of the folder has another content than the manifest says.
    #[error("{path} has another content than was exported: its sha256 is {found}, not {wanted}")]
    FileContent {
        /// The file.
        path: PathBuf,
        /// The hash that the manifest says.
        wanted: String,
        /// The hash of what is there.
        found: String,
    },
    /// The manifest is not valid JSON of the expected shape.
    #[error("{path} is not a valid manifest: {message}")]
    Manifest {
        /// The manifest's path.
        path: PathBuf,
        /// What is wrong, naming the field.
        message: String,
    },
    /// The known answer is not valid JSON of the expected shape.
    #[error("{path} is not a valid known answer: {message}")]
    KnownAnswer {
        /// The file's path.
        path: PathBuf,
        /// What is wrong, naming the field.
        message: String,
    },
    /// A file is of another version.
    #[error(
        "{path} has schema_version {found} and needs a glmserve that reads it; this build reads {expected}. Export the checkpoint again with the glm-export of this release"
    )]
    SchemaVersion {
        /// The file's path.
        path: PathBuf,
        /// The version in the file.
        found: u64,
        /// The version this build reads.
        expected: u64,
    },
    /// ONNX Runtime refused the library, the graph or the options.
    #[error("ONNX Runtime: {0}")]
    Runtime(String),
    /// The device failed, after the graph was loaded, in a way that only a new process heals.
    #[error("the device failed while it was prepared, and this process can't use it again ({0})")]
    DeviceLost(String),
    /// The configuration can't work with this model or machine.
    #[error("{0}")]
    Config(String),
}
