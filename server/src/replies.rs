//! Owns what is done with replies: start one, join one that runs or is kept, resume one by its key.
//!
//! Invariant: a reply is generated once, however often it is asked for; what the engine refuses is never kept.

use std::sync::Arc;

use glm_engine::{Request, SubmitError};
use tracing::Instrument;

use crate::error::ApiError;
use crate::metrics::{Arrival, StreamRecord};
use crate::principal::{Client, Owner};
use crate::state::AppState;
use crate::stream::cursor::{Cursor, EventId};
use crate::stream::event::Event;
use crate::stream::event_log::{LogReader, event_log};
use crate::stream::generation::Generation;
use crate::stream::names::{RequestKey, StreamId};
use crate::stream::pump::Pump;
use crate::stream::reply_stream::{Form, ReplyHead, ReplyStream};
use crate::stream::store::Registered;
use crate::stream::time_limits::TimeLimits;
use crate::text::detokenizer::Detokenizer;
use crate::text::reply::ReplyText;
use crate::text::stop::StopMatcher;

/// A request that passed every check of its own.
#[derive(Debug)]
pub(crate) struct NewReply {
    /// For the engine.
    pub(crate) request: Request,
    /// Stop strings.
    pub(crate) stop: Vec<String>,
    /// What every answer repeats.
    pub(crate) head: ReplyHead,
    /// The form asked for.
    pub(crate) form: Form,
    /// The client's name for it.
    pub(crate) key: Option<RequestKey>,
    /// Whose it is.
    pub(crate) owner: Owner,
    /// In whose share it is kept.
    pub(crate) client: Client,
    /// When to give up.
    pub(crate) limits: TimeLimits,
    /// When to give up waiting if its key names a reply already, whose limits are not this request's.
    pub(crate) patience: TimeLimits,
}

/// A reply and a reader of it.
#[derive(Debug)]
pub(crate) struct OpenReply {
    /// The reply.
    pub(crate) stream: Arc<ReplyStream>,
    /// Reads it; dropping the last reader of a reply that can't be resumed aborts it.
    pub(crate) reader: LogReader,
    /// When the request arrived that started it, if this is that request.
    pub(crate) arrival: Option<Arrival>,
}

/// Hands a request to the engine and starts its pump, unless its key names a reply already.
///
/// # Errors
/// What the engine refuses; a key that names another request.
pub(crate) fn start(state: &AppState, new: NewReply, arrival: Arrival) -> Result<OpenReply, ApiError> {
    let NewReply { request, stop, head, form, key, owner, client, limits, patience } = new;
    let (writer, log) = event_log(state.options.log_limits);
    let id = StreamId::random().map_err(|error| ApiError::internal(error.to_string()))?;
    // Before anybody can find the stream: its pump must never see it without a reader.
    let reader = log.reader(0);
    let (stream, wishes) = ReplyStream::new(id, owner, client, key.clone(), head, form, log);
    let stream = match state.streams.register(stream) {
        Registered::New(stream) => stream,
        Registered::Existing(stream) => {
            check_fingerprint(&stream, key.as_ref())?;
            return join(state, stream, None, patience);
        }
    };
    let request = Request { deadline: limits.first_token, max_queue_time: limits.queue, ..request };
    let min_tokens = request.sampling.min_tokens;
    let events = match state.engine.submit(request) {
        Ok(events) => events,
        Err(error) => {
            // Another request with this key may read it already, and hears the same. Whoever comes from now
            // on starts anew.
            state.streams.withdraw(&stream);
            writer.close(Event::Error(error.clone().into()));
            return Err(refusal(state, error));
        }
    };
    let detokenizer = Detokenizer::new(Arc::clone(state.model.tokenizer.vocabulary()));
    let stop = StopMatcher::new(stop);
    let text = ReplyText::new(detokenizer, state.model.chat.reply_prefix(), stop, min_tokens);
    let pump = Pump {
        events,
        generation: Generation::new(text, stream.head.num_prompt_tokens),
        log: writer,
        stream: Arc::clone(&stream),
        wishes,
        store: Arc::clone(&state.streams),
        record: StreamRecord::new(Arc::clone(&state.metrics), arrival),
        limits,
        grace: state.options.resume_grace,
    };
    // What it logs is about the request that started it, also when another request reads the reply.
    state.pumps.spawn(pump.run().in_current_span());
    Ok(OpenReply { stream, reader, arrival: Some(arrival) })
}

/// Whether the engine would take a request: a look, not a promise.
///
/// # Errors
/// What the engine would say.
pub(crate) fn check_room(state: &AppState) -> Result<(), ApiError> {
    state.engine.check_room().map_err(|error| refusal(state, error))
}

fn refusal(state: &AppState, error: SubmitError) -> ApiError {
    if state.is_draining() { ApiError::draining() } else { error.into() }
}

/// The reply that a key names, after the event `last`. Nothing is generated again.
///
/// # Errors
/// The key names nothing, or another request; the event is not of that reply.
pub(crate) fn resume(
    state: &AppState,
    owner: Owner,
    key: &RequestKey,
    last: Option<EventId>,
    patience: TimeLimits,
) -> Result<OpenReply, ApiError> {
    let stream = state.streams.find_key(owner, &key.key).ok_or_else(ApiError::stream_gone)?;
    check_fingerprint(&stream, Some(key))?;
    join(state, stream, last, patience)
}

/// One more reader, after the event `last`, that waits as long as its own limits say: the others and
/// the reply are not ended by them.
///
/// # Errors
/// The event is not of that reply.
pub(crate) fn join(
    state: &AppState,
    stream: Arc<ReplyStream>,
    last: Option<EventId>,
    patience: TimeLimits,
) -> Result<OpenReply, ApiError> {
    let cursor = place(&stream, last)?;
    state.metrics.stream_resumed();
    let reader = stream.log.reader(cursor.map_or(0, |cursor| cursor.event)).within(patience);
    Ok(OpenReply { stream, reader, arrival: None })
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
