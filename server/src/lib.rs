//! An OpenAI-compatible streaming server for ChatGLM3 and its family.

pub mod error;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod metrics;
pub mod stream;
pub mod text;
