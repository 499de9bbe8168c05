//! An OpenAI-compatible streaming server for ChatGLM3 and its family.

pub mod auth;
mod body_memory;
pub mod check;
pub mod client;
pub mod config;
mod engine_watch;
pub mod error;
mod fields;
#[cfg(test)]
#[path = "../tests/it/support/model_dir.rs"]
mod fixtures;
pub mod http;
mod json;
pub mod known_answer;
pub mod lifecycle;
pub mod memory_budget;
pub mod metrics;
mod middleware;
pub mod npy;
pub mod origin;
#[cfg(test)]
mod peak_memory;
mod random;
mod routes;
pub mod shutdown;
pub mod state;
pub mod stream;
pub mod text;

use std::net::TcpListener;

use actix_web::middleware::from_fn;
use actix_web::{App, web};
use glm_engine::{LoadError, RunError, SequenceError, SubmitError};
use tokio::sync::mpsc;

pub use crate::engine_watch::{ENGINE_FAILED_EXIT_CODE, EngineFailure};
use crate::lifecycle::{Lifecycle, Loaded};
use crate::middleware::{cors, paths, request_id};
pub use crate::routes::request_fingerprint;
use crate::stream::connection;
use crate::text::TextError;

/// Why a model could not be loaded; the words are for whoever started the server.
pub type LoadFailure = Box<dyn std::error::Error + Send + Sync>;

/// Why a server ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The sockets failed.
    #[error("HTTP: {0}")]
    Http(#[from] std::io::Error),
    /// The model could not be loaded.
    #[error("{0}")]
    Load(LoadFailure),
    /// The first generation's prompt could not be made.
    #[error("warm-up: {0}")]
    WarmUpText(#[from] TextError),
    /// Not even the first generation fits.
    #[error(
        "a prompt of one word has {num_prompt_tokens} tokens, and a sequence may have {max_model_len}: raise \
         --max-model-len or --kv-cache-memory"
    )]
    NoRoom {
        /// The shortest honest prompt.
        num_prompt_tokens: usize,
        /// The limit.
        max_model_len: usize,
    },
    /// The first generation was refused.
    #[error("warm-up: {0}")]
    WarmUpSubmit(#[from] SubmitError),
    /// The first generation failed.
    #[error("warm-up: {0}")]
    WarmUp(#[from] SequenceError),
    /// The engine failed while it served, in a way that only a new process heals.
    #[error("the engine failed for good: {0}")]
    Engine(#[from] EngineFailure),
    /// The same prompt had two answers.
    #[error("warm-up: a greedy generation gave {first:?}, and then {second:?}")]
    Unsteady {
        /// Tokens of the first.
        first: Vec<u32>,
        /// Tokens of the second.
        second: Vec<u32>,
    },
}

impl ServeError {
    /// Whether the engine, or its device, failed in a way that only a new process heals: the process has to end
    /// with [`ENGINE_FAILED_EXIT_CODE`].
    pub fn is_engine_failure(&self) -> bool {
        match self {
            Self::Engine(_) => true,
            Self::WarmUp(error) => {
                matches!(error, SequenceError::DeviceLost(_) | SequenceError::EngineDied)
            }
            Self::Load(error) => {
                let verified = error.downcast_ref();
                matches!(verified, Some(known_answer::VerifyError::Run(RunError { is_permanent: true, .. })))
                    || matches!(error.downcast_ref(), Some(LoadError::DeviceLost(_)))
            }
            _ => false,
        }
    }
}

/// Answers on `listener` at once, refuses requests until `loading` is done and the model warmed up, and serves then
/// until `signals` says so: once to drain, twice to end what still runs with an error, three times to go at once. A
/// closed channel is one signal. A signal before the model is ready ends the server at once: nothing was accepted.
///
/// # Errors
/// [`ServeError`]: the sockets, the loading or the first generation failed, or the engine did for good. Then every
/// stream was told first.
pub async fn serve<E: Into<LoadFailure>>(
    listener: TcpListener,
    lifecycle: web::Data<Lifecycle>,
    loading: impl Future<Output = Result<Loaded, E>>,
    mut signals: mpsc::Receiver<()>,
) -> Result<(), ServeError> {
    let shared = lifecycle.clone();
    let app = move || {
        App::new()
            .app_data(shared.clone())
            // The last one is the first to see a request.
            .wrap(from_fn(routes::loading::refuse))
            .wrap(from_fn(cors::guard))
            .wrap(from_fn(routes::observe))
            .wrap(from_fn(paths::correct))
            .wrap(from_fn(request_id::assign))
            .wrap(from_fn(routes::loading::attach_state))
            .configure(routes::configure)
    };
    connection::bound_sends(&listener, lifecycle.options.write_timeout)?;
    let server = http::listen(listener, app, lifecycle.clone(), lifecycle.options.connection_limits)?;
    let handle = server.handle();
    tokio::pin!(server);
    let end = async {
        let state = tokio::select! {
            state = lifecycle.start(loading) => state?,
            _ = signals.recv() => return Ok(false),
        };
        tokio::select! {
            graceful = shutdown::drain(&lifecycle, &state, &mut signals) => Ok::<_, ServeError>(graceful),
            failure = engine_watch::look_after(&state) => {
                shutdown::give_up(&state, &failure).await;
                Err(failure.into())
            }
        }
    };
    let end = tokio::select! {
        result = &mut server => return Ok(result?),
        end = end => end,
    };
    // Not awaited alone: the server answers only while it is polled.
    let graceful = match &end {
        Ok(graceful) => *graceful,
        // What the streams were told is still on its way.
        Err(error) => error.is_engine_failure(),
    };
    let (result, ()) = tokio::join!(server, handle.stop(graceful));
    end?;
    Ok(result?)
}
