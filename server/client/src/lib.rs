//! The streaming client shared by the terminal chat, the load generator and the tests.
//!
//! It speaks HTTP to any OpenAI-compatible server and knows nothing of the server's inside.

pub mod chat;
pub mod client;
pub mod clock;
mod config;
pub mod error;
mod random;
pub mod resume;
pub mod retry;
pub mod seal;
pub mod sse;
pub mod stream;
pub mod terminal;
#[cfg(any(test, feature = "test-doubles"))]
pub mod testing;

pub use chat::{ApiError, ChatRequest, Message, Seal, StreamEvent, Usage};
pub use client::Client;
pub use config::ClientConfig;
pub use error::ClientError;
pub use resume::ResumingStream;
pub use retry::RetryPolicy;
pub use seal::Verified;
pub use stream::ChatStream;
