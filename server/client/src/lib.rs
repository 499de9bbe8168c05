//! The streaming client shared by the terminal chat, the bench and the tests.
//!
//! It speaks HTTP to any OpenAI-compatible server and knows nothing of the server's inside.

pub mod bench;
pub mod chat;
pub mod client;
mod clock;
pub mod error;
pub mod sse;
pub mod stream;
#[cfg(test)]
mod testing;

pub use chat::{ApiError, ChatRequest, Message, StreamEvent, Usage};
pub use client::{Client, ClientConfig};
pub use error::ClientError;
pub use stream::ChatStream;
