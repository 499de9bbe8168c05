//! Owns what all HTTP workers share.
//!
//! Invariant: what changes is atomic; only the store of streams has a lock, for a few look-ups.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use glm_engine::{EngineHandle, Fault, Manifest, Request, SubmitError};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::body_memory::BodyMemory;
use crate::client::Client;
use crate::error::ApiError;
use crate::http::ConnectionLimits;
use crate::known_answer::KnownAnswer;
use crate::lifecycle::Lifecycle;
use crate::metrics::{Arrival, Metrics, StreamRecord};
use crate::origin::AllowedOrigins;
use crate::stream::cursor::{Cursor, EventId};
use crate::stream::event::Event;
use crate::stream::event_log::{LogLimits, LogReader, event_log};
use crate::stream::memory_store::{MemoryStore, StoreLimits};
use crate::stream::pump::Pump;
use crate::stream::readers::Readers;
use crate::stream::reply_stream::{Form, ReplyHead, ReplyStream};
use crate::stream::store::{Owner, Registered, RequestKey, StreamId, StreamStore};
use crate::stream::time_limits::TimeLimits;
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

/// A request that passed every check of its own.
#[derive(Debug)]
pub struct NewReply {
    /// For the engine.
    pub request: Request,
    /// Stop strings.
    pub stop: Vec<String>,
    /// What every answer repeats.
    pub head: ReplyHead,
    /// The form asked for.
    pub form: Form,
    /// The client's name for it.
    pub key: Option<RequestKey>,
    /// Whose it is.
    pub owner: Owner,
    /// In whose share it is kept.
    pub client: Client,
    /// When to give up.
    pub limits: TimeLimits,
    /// When to give up waiting if its key names a reply already, whose limits are not this request's.
    pub patience: TimeLimits,
}

/// A reply and a reader of it.
#[derive(Debug)]
pub struct OpenReply {
    /// The reply.
    pub stream: Arc<ReplyStream>,
    /// Reads it; dropping the last reader of a reply that can't be resumed aborts it.
    pub reader: LogReader,
    /// When the request arrived that started it, if this is that request.
    pub arrival: Option<Arrival>,
}

impl AppState {
    /// A server whose model was warmed up.
    pub(crate) fn new(
        lifecycle: &Lifecycle,
        model: ServedModel,
        engine: EngineHandle,
        known_answer: KnownAnswer,
    ) -> Self {
        let Lifecycle { options, metrics, .. } = lifecycle;
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

    /// Hands a request to the engine and starts its pump, unless its key names a reply already.
    ///
    /// # Errors
    /// What the engine refuses; a key that names another request.
    pub fn start_reply(&self, new: NewReply, arrival: Arrival) -> Result<OpenReply, ApiError> {
        let NewReply { request, stop, head, form, key, owner, client, limits, patience } = new;
        let (writer, log) = event_log(self.options.log_limits);
        let id = StreamId::random().map_err(|error| ApiError::internal(error.to_string()))?;
        // Before anybody can find the stream: its pump must never see it without a reader.
        let reader = log.reader(0);
        let (stream, wishes) = ReplyStream::new(id, owner, client, key.clone(), head, form, log);
        let stream = match self.streams.register(stream) {
            Registered::New(stream) => stream,
            Registered::Existing(stream) => {
                check_fingerprint(&stream, key.as_ref())?;
                return self.attach(stream, None, patience);
            }
        };
        let request = Request { deadline: limits.first_token, max_queue_time: limits.queue, ..request };
        let min_tokens = request.sampling.min_tokens;
        let events = match self.engine.submit(request) {
            Ok(events) => events,
            Err(error) => {
                // Another request with this key may read it already, and hears the same. Whoever comes from now
                // on starts anew.
                self.streams.withdraw(&stream);
                writer.close(Event::Error(error.clone().into()));
                return Err(self.refusal(error));
            }
        };
        let detokenizer = Detokenizer::new(Arc::clone(self.model.tokenizer.vocabulary()));
        let pump = Pump {
            events,
            text: ReplyText::new(
                detokenizer,
                self.model.chat.reply_prefix(),
                StopMatcher::new(stop),
                min_tokens,
            ),
            log: writer,
            stream: Arc::clone(&stream),
            wishes,
            store: Arc::clone(&self.streams),
            record: StreamRecord::new(Arc::clone(&self.metrics), arrival),
            limits,
            grace: self.options.resume_grace,
        };
        // What it logs is about the request that started it, whoever reads the reply.
        self.pumps.spawn(pump.run().in_current_span());
        Ok(OpenReply { stream, reader, arrival: Some(arrival) })
    }

    /// Whether the engine would take a request: a look, not a promise.
    ///
    /// # Errors
    /// What the engine would say.
    pub fn check_room(&self) -> Result<(), ApiError> {
        self.engine.check_room().map_err(|error| self.refusal(error))
    }

    fn refusal(&self, error: SubmitError) -> ApiError {
        if self.is_draining() { ApiError::draining() } else { error.into() }
    }

    /// The reply that a key names, after the event `last`. Nothing is generated again.
    ///
    /// # Errors
    /// The key names nothing, or another request; the event is not of that reply.
    pub fn resume(
        &self,
        owner: Owner,
        key: &RequestKey,
        last: Option<EventId>,
        patience: TimeLimits,
    ) -> Result<OpenReply, ApiError> {
        let stream = self.streams.find_key(owner, &key.key).ok_or_else(ApiError::stream_gone)?;
        check_fingerprint(&stream, Some(key))?;
        self.attach(stream, last, patience)
    }

    /// One more reader, after the event `last`, that waits as long as its own limits say: the others and
    /// the reply are not ended by them.
    ///
    /// # Errors
    /// The event is not of that reply.
    pub fn attach(
        &self,
        stream: Arc<ReplyStream>,
        last: Option<EventId>,
        patience: TimeLimits,
    ) -> Result<OpenReply, ApiError> {
        let cursor = place(&stream, last)?;
        self.metrics.stream_resumed();
        let reader = stream.log.reader(cursor.map_or(0, |cursor| cursor.event)).within(patience);
        Ok(OpenReply { stream, reader, arrival: None })
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

/// Where the event `last` is in a reply.
///
/// # Errors
/// It is not of that reply.
pub(crate) fn place(stream: &ReplyStream, last: Option<EventId>) -> Result<Option<Cursor>, ApiError> {
    match last {
        Some(last) if last.stream != stream.tag => Err(ApiError::cursor_of_another_stream(&last.to_string())),
        Some(last) if !stream.has(last.cursor) => Err(ApiError::cursor_out_of_range(&last.to_string())),
        last => Ok(last.map(|last| last.cursor)),
    }
}

fn check_fingerprint(stream: &ReplyStream, key: Option<&RequestKey>) -> Result<(), ApiError> {
    match stream.key.as_ref() == key {
        true => Ok(()),
        false => Err(ApiError::idempotency_key_reused()),
    }
}

/// Seconds since 1970.
pub fn unix_time() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |duration| duration.as_secs())
}
