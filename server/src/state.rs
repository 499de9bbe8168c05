//! Owns what all HTTP workers share.
//!
//! Invariant: what changes is atomic; only the store of streams has a lock, for a few look-ups. It is data: what is done
//! with it is in [`crate::replies`] and in the routes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use glm_engine::{EngineHandle, Fault};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::body_memory::BodyMemory;
use crate::http::ConnectionLimits;
use crate::known_answer::KnownAnswer;
use crate::metrics::Metrics;
use crate::origin::AllowedOrigins;
use crate::served_model::ServedModel;
use crate::stream::event_log::LogLimits;
use crate::stream::memory_store::{MemoryStore, StoreLimits};
use crate::stream::readers::Readers;
use crate::stream::store::StreamStore;
use crate::stream::time_limits::TimeLimits;

/// Limits and periods of the HTTP side.
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// Whose pages may use the server.
    pub allowed_origins: AllowedOrigins,
    /// Most bytes of a request's body.
    pub max_body_bytes: usize,
    /// How many connections there may be.
    pub connection_limits: ConnectionLimits,
    /// Most bytes of all bodies that are being read.
    pub body_memory_bytes: usize,
    /// Silence after which a stream says something.
    pub comment_period: Duration,
    /// How long headers wait for the first token.
    pub status_hold: Duration,
    /// How long a client may take no bytes.
    pub write_timeout: Duration,
    /// How long running streams may go on after the first signal.
    pub drain_timeout: Duration,
    /// How long the engine may fail to give its known answer after a fault before the process ends;
    /// `None` is for ever.
    pub fault_exit_timeout: Option<Duration>,
    /// What a reply may grow to.
    pub log_limits: LogLimits,
    /// What a reply may take; a request may ask for less.
    pub time_limits: TimeLimits,
    /// How long a reply that can be resumed goes on without a reader.
    pub resume_grace: Duration,
    /// What is kept for clients that come back.
    pub store_limits: StoreLimits,
}

/// What all workers share once the model is ready.
#[derive(Debug)]
pub struct AppState {
    /// Limits and periods.
    pub options: HttpOptions,
    /// The model.
    pub model: ServedModel,
    /// The engine.
    pub engine: EngineHandle,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// The replies that run, and those kept for clients that come back.
    pub streams: Arc<dyn StreamStore>,
    /// Bounds the bodies that are being read.
    pub(crate) body_memory: Arc<BodyMemory>,
    /// The pumps that run.
    pub pumps: TaskTracker,
    /// The streamed answers that are being sent.
    pub readers: Readers,
    /// Seconds since the epoch at the start.
    pub created: u64,
    /// What the warm-up recorded.
    pub(crate) known_answer: KnownAnswer,
    draining: AtomicBool,
    engine_failed: AtomicBool,
}

/// Whether requests are welcome.
#[derive(Debug, Clone, PartialEq)]
pub enum Readiness {
    /// Yes.
    Ready,
    /// The server is going away.
    Draining,
    /// The engine takes nothing.
    EngineDown,
    /// The engine had a fault, and has not given the known answer since.
    Faulty(Fault),
}

impl AppState {
    /// A server whose model was warmed up.
    pub(crate) fn new(
        options: &HttpOptions,
        metrics: &Arc<Metrics>,
        model: ServedModel,
        engine: EngineHandle,
        known_answer: KnownAnswer,
    ) -> Self {
        Self {
            body_memory: Arc::new(BodyMemory::new(options.body_memory_bytes, Instant::now())),
            streams: Arc::new(MemoryStore::new(options.store_limits, Arc::clone(metrics))),
            options: options.clone(),
            model,
            engine,
            metrics: Arc::clone(metrics),
            pumps: TaskTracker::new(),
            readers: Readers::default(),
            created: unix_time(),
            known_answer,
            draining: AtomicBool::new(false),
            engine_failed: AtomicBool::new(false),
        }
    }

    /// Takes no more requests.
    pub fn start_draining(&self) {
        self.draining.store(true, Ordering::Release);
        self.engine.drain();
    }

    /// Whether the server is going away.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// The engine has failed for good: this process is about to end.
    pub(crate) fn set_engine_failed(&self) {
        self.engine_failed.store(true, Ordering::Release);
    }

    /// Whether the engine has failed for good.
    pub fn has_engine_failed(&self) -> bool {
        self.engine_failed.load(Ordering::Acquire)
    }

    /// Whether requests are welcome.
    pub fn readiness(&self) -> Readiness {
        let status = self.engine.status();
        if self.is_draining() {
            Readiness::Draining
        } else if !status.accepting {
            Readiness::EngineDown
        } else if let Some(fault) = status.fault {
            Readiness::Faulty(fault)
        } else {
            Readiness::Ready
        }
    }
}

/// Seconds since 1970.
pub fn unix_time() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |duration| duration.as_secs())
}
