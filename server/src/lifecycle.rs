//! Owns the start of the server: HTTP answers from the moment that the port is bound, and what requests work with is
//! there once the model is loaded and warmed up.
//!
//! Invariant: no request waits for the model. While it is loaded, requests are refused at once; what a request is
//! given is complete and never taken away again.

use std::sync::{Arc, OnceLock};

use actix_web::web;
use glm_engine::EngineHandle;

use crate::api_keys::ApiKeys;
use crate::error::ApiError;
use crate::http::Watch;
use crate::known_answer;
use crate::metrics::Metrics;
use crate::serve_error::{LoadFailure, ServeError};
use crate::served_model::ServedModel;
use crate::state::{AppState, HttpOptions};
use crate::stream::connection::Connection;
use crate::stream::connections::Connections;

/// A model that is loaded, and the engine that runs it.
#[derive(Debug)]
pub struct Loaded {
    /// The model.
    pub model: ServedModel,
    /// The engine.
    pub engine: EngineHandle,
}

/// What all workers share from the start.
#[derive(Debug)]
pub struct Lifecycle {
    /// Limits and periods.
    pub options: HttpOptions,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// Who may use `/v1`; `None` is everybody.
    pub keys: Option<ApiKeys>,
    /// The open connections.
    pub connections: Connections,
    state: OnceLock<web::Data<AppState>>,
}

impl Lifecycle {
    /// A server whose model is not loaded.
    pub fn new(options: HttpOptions, metrics: Arc<Metrics>, keys: Option<ApiKeys>) -> Self {
        Self { options, metrics, keys, connections: Connections::default(), state: OnceLock::new() }
    }

    /// What requests work with; `None` while the model is loaded and warmed up.
    pub fn state(&self) -> Option<&web::Data<AppState>> {
        self.state.get()
    }

    /// Waits for the model, warms it up and lets requests in.
    ///
    /// # Errors
    /// [`ServeError`]: the model was not loaded, or the first generation failed.
    pub(crate) async fn start<E: Into<LoadFailure>>(
        &self,
        loading: impl Future<Output = Result<Loaded, E>>,
    ) -> Result<web::Data<AppState>, ServeError> {
        let Loaded { model, engine } = loading.await.map_err(|error| ServeError::Load(error.into()))?;
        let known_answer = known_answer::warm_up(&model, &engine).await?;
        let state = web::Data::new(AppState::new(&self.options, &self.metrics, model, engine, known_answer));
        // Only the first is kept; there is one start.
        let _ = self.state.set(state.clone());
        tracing::info!("ready");
        Ok(state)
    }
}

impl Watch for web::Data<Lifecycle> {
    fn refused(&self, error: &ApiError) {
        self.metrics.refused(error.code());
    }

    fn opened(&self, connection: &Arc<Connection>) {
        self.connections.add(connection);
    }

    fn is_draining(&self) -> bool {
        self.state().is_some_and(|state| state.is_draining())
    }
}
