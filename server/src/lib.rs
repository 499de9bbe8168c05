//! An OpenAI-compatible streaming server for ChatGLM3 and its family.

pub mod api_keys;
mod body_memory;
pub mod commands;
pub mod config;
mod engine_failure;
mod engine_watch;
pub mod error;
mod fields;
#[cfg(test)]
#[path = "../tests/it/support/model_dir.rs"]
mod fixtures;
mod gpu;
pub mod http;
mod json;
mod known_answer;
pub mod lifecycle;
pub mod memory_budget;
pub mod metrics;
mod middleware;
pub mod origin;
#[cfg(test)]
mod peak_memory;
pub mod principal;
mod random;
mod replies;
mod routes;
mod serve;
mod serve_error;
mod served_model;
pub mod shutdown;
pub mod state;
pub mod stream;
pub mod text;
mod verify;

pub use crate::engine_failure::{ENGINE_FAILED_EXIT_CODE, EngineFailure};
pub use crate::routes::request_fingerprint;
pub use crate::serve::serve;
pub use crate::serve_error::{LoadFailure, ServeError};
pub use crate::served_model::ServedModel;
