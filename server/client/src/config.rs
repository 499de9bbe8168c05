//! Owns where the server is, and how long to wait for it.

use std::time::Duration;

use crate::error::ClientError;

/// Where the server is, and how long to wait for it.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// The server's address, without `/v1`: `http://127.0.0.1:8000`.
    pub base_url: String,
    /// Sent as a bearer token.
    pub api_key: Option<String>,
    /// The model that must answer, by its digest: the server refuses if it has another.
    pub model_digest: Option<String>,
    /// The longest wait for a connection.
    pub connect_timeout: Duration,
    /// The longest silence, before the headers and between two reads; heartbeats count as a sign of life.
    pub idle_timeout: Duration,
    /// The largest event that is read.
    pub max_event_bytes: usize,
}

impl ClientConfig {
    /// The defaults for the server at `base_url`.
    pub fn new(base_url: impl Into<String>) -> Self {
        Self {
            base_url: base_url.into(),
            api_key: None,
            model_digest: None,
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(120),
            max_event_bytes: 1 << 20,
        }
    }
}

/// The result of `work`, or [`ClientError::Idle`] when it takes longer.
pub(crate) async fn within<T>(
    idle_timeout: Duration,
    work: impl Future<Output = Result<T, reqwest::Error>>,
) -> Result<T, ClientError> {
    match tokio::time::timeout(idle_timeout, work).await {
        Ok(result) => result.map_err(ClientError::Transport),
        Err(_) => Err(ClientError::Idle(idle_timeout)),
    }
}
