//! Owns the ways in which a request or its stream fails.
//!
//! Invariant: each is told apart by type, and each says in words what a person can act on.

use std::time::Duration;

use crate::chat::ApiError;
use crate::sse::EventTooLong;

/// Why a request or its stream failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The connection failed or broke.
    #[error("connection: {}", with_sources(.0))]
    Transport(#[source] reqwest::Error),
    /// The server said nothing for this long.
    #[error("the server was silent for {0:?}")]
    Idle(Duration),
    /// The server answered with an error status.
    #[error("HTTP {status}: {}", error.as_ref().map_or(body.as_str(), |error| &error.message))]
    Status {
        /// The HTTP status code.
        status: u16,
        /// The OpenAI error in the body, if it was one.
        error: Option<Box<ApiError>>,
        /// The `Retry-After` header in seconds, if it was sent as a whole number.
        retry_after_s: Option<u64>,
        /// The body as it came.
        body: String,
    },
    /// A success that is not an event stream.
    #[error("the answer is no event stream but {0:?}")]
    NotAStream(String),
    /// The stream ended without `[DONE]`.
    #[error("the stream ended without [DONE]{}", broken.as_ref().map_or(String::new(), |error| format!(": {}", with_sources(error))))]
    Truncated {
        /// How the connection broke; `None` if the server closed it in good order.
        #[source]
        broken: Option<reqwest::Error>,
    },
    /// An event that cannot be read.
    #[error("an event that cannot be read: {reason}: {data}")]
    Malformed {
        /// What is wrong with it.
        reason: String,
        /// Its beginning.
        data: String,
    },
    /// An event over the limit.
    #[error(transparent)]
    EventTooLong(#[from] EventTooLong),
    /// The text or its token count is not what the server says that it sent.
    #[error(
        "the answer is not what the server says it sent: {what}: {received} was received, {sealed} was sent"
    )]
    HashMismatch {
        /// `text_sha256` or `completion_tokens`.
        what: &'static str,
        /// By this client's count.
        received: String,
        /// By the server's.
        sealed: String,
    },
    /// A server that seals its answers ended this one without.
    #[error("the stream ended without its hash")]
    Unsealed,
    /// The server joined another stream to this one.
    #[error("the stream went on as another: {0:?}")]
    WrongStream(Option<String>),
    /// Every try to go on failed.
    #[error("gave up after {tries} tries: {last}")]
    GaveUp {
        /// How many tries were made since the last event that came.
        tries: u32,
        /// Why the last one failed.
        last: Box<ClientError>,
    },
    /// A body over the limit.
    #[error("the answer is longer than {0} bytes")]
    BodyTooLong(usize),
}

/// reqwest keeps the useful words ("connection refused") in its sources.
fn with_sources(error: &reqwest::Error) -> String {
    let mut words = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        words = format!("{words}: {error}");
        source = error.source();
    }
    words
}

impl ClientError {
    pub(crate) fn malformed(reason: &serde_json::Error, data: &str) -> Self {
        Self::Malformed { reason: reason.to_string(), data: data.chars().take(200).collect() }
    }
}
