//! An OpenAI-compatible streaming server for ChatGLM3 and its family.

#[cfg(test)]
pub(crate) mod fixtures;
pub mod text;
