//! Owns what all HTTP workers share.
//!
//! Invariant: nothing here is locked while a request is served; what changes is atomic.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use glm_engine::{EngineHandle, Manifest, Request};
use tokio_util::task::TaskTracker;

use crate::auth::ApiKeys;
use crate::error::ApiError;
use crate::metrics::{Arrival, Metrics, StreamRecord};
use crate::stream::event_log::{LogLimits, LogReader, event_log};
use crate::stream::pump::Pump;
use crate::text::TextError;
use crate::text::chat_format::ChatFormat;
use crate::text::detokenizer::Detokenizer;
use crate::text::reply::ReplyText;
use crate::text::stop::StopMatcher;
use crate::text::tokenizer::Tokenizer;

/// The model's side of the server.
#[derive(Debug)]
pub struct ServedModel {
    /// What the exporter said.
    pub manifest: Manifest,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat format.
    pub chat: ChatFormat,
    /// Names that requests may use; the first is the manifest's.
    pub names: Vec<String>,
    /// Names the exact model in every answer.
    pub fingerprint: String,
}

impl ServedModel {
    /// Reads the tokenizer of the folder `dir`; `aliases` are names besides the manifest's.
    ///
    /// # Errors
    /// [`TextError`]: the tokenizer or the chat format can't be used.
    pub fn load(dir: &std::path::Path, manifest: Manifest, aliases: &[String]) -> Result<Self, TextError> {
        let mut names = vec![manifest.model.name.clone()];
        for alias in aliases.iter().map(|alias| alias.trim()).filter(|alias| !alias.is_empty()) {
            if !names.iter().any(|name| name == alias) {
                names.push(alias.to_owned());
            }
        }
        let digest = manifest.digest.rsplit(':').next().unwrap_or_default();
        Ok(Self {
            tokenizer: Tokenizer::load(dir, &manifest)?,
            chat: ChatFormat::new(&manifest.chat)?,
            fingerprint: format!("fp_{}", digest.chars().take(12).collect::<String>()),
            names,
            manifest,
        })
    }
}

/// Limits and periods of the HTTP side.
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// Most bytes of a request's body.
    pub max_body_bytes: usize,
    /// Silence after which a stream says something.
    pub comment_period: Duration,
    /// How long running streams may go on after the first signal.
    pub drain_timeout: Duration,
    /// What a reply may grow to.
    pub log_limits: LogLimits,
}

/// What all workers share.
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
    /// Who may use `/v1`; `None` is everybody.
    pub keys: Option<ApiKeys>,
    /// The pumps that run.
    pub pumps: TaskTracker,
    /// Seconds since the epoch at the start.
    pub created: u64,
    warm: AtomicBool,
    draining: AtomicBool,
}

/// Whether requests are welcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// Yes.
    Ready,
    /// The first generation is not finished.
    WarmingUp,
    /// The server is going away.
    Draining,
    /// The engine takes nothing.
    EngineDown,
}

impl AppState {
    /// A server that is not warm yet.
    pub fn new(
        options: HttpOptions,
        model: ServedModel,
        engine: EngineHandle,
        metrics: Arc<Metrics>,
        keys: Option<ApiKeys>,
    ) -> Self {
        Self {
            options,
            model,
            engine,
            metrics,
            keys,
            pumps: TaskTracker::new(),
            created: unix_time(),
            warm: AtomicBool::new(false),
            draining: AtomicBool::new(false),
        }
    }

    /// Hands a request to the engine and starts its pump. Dropping the reader aborts the request.
    ///
    /// # Errors
    /// What the engine refuses.
    pub fn start_reply(
        &self,
        request: Request,
        stop: Vec<String>,
        arrival: Arrival,
    ) -> Result<LogReader, ApiError> {
        if self.is_draining() {
            return Err(ApiError::draining());
        }
        let num_prompt_tokens = request.prompt_token_ids.len();
        let events = self.engine.submit(request)?;
        let detokenizer = Detokenizer::new(Arc::clone(self.model.tokenizer.vocabulary()));
        let (log, reader) = event_log(self.options.log_limits);
        let pump = Pump {
            events,
            text: ReplyText::new(detokenizer, self.model.chat.reply_prefix(), StopMatcher::new(stop)),
            log,
            record: StreamRecord::new(Arc::clone(&self.metrics), arrival),
            num_prompt_tokens,
        };
        self.pumps.spawn(pump.run());
        Ok(reader)
    }

    /// The first generation is finished.
    pub fn set_warm(&self) {
        self.warm.store(true, Ordering::Release);
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

    /// Whether requests are welcome.
    pub fn readiness(&self) -> Readiness {
        if self.is_draining() {
            Readiness::Draining
        } else if !self.engine.status().accepting {
            Readiness::EngineDown
        } else if !self.warm.load(Ordering::Acquire) {
            Readiness::WarmingUp
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
