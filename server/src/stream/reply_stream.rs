//! Owns what is known of one reply besides its text: its names, whose it is, and the wishes of those
//! who are not its pump.
//!
//! Invariant: what a reader sees of a reply (id, time, model) is fixed here before the first event.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{mpsc, oneshot, watch};

use super::cursor::{Cursor, StreamTag};
use super::event::{AbortReason, Event};
use super::event_log::EventLog;
use super::names::{RequestKey, StreamId};
use crate::principal::Client;
use crate::principal::Owner;
use glm_engine::Progress;

/// Questions that may wait for one pump; heartbeats are seconds apart.
const MAX_QUESTIONS: usize = 8;

/// What every part of the answer repeats.
#[derive(Debug, Clone)]
pub struct ReplyHead {
    /// Name of the completion.
    pub id: String,
    /// Seconds since the epoch.
    pub created: u64,
    /// The name that the request used.
    pub model: String,
    /// Names the exact model.
    pub fingerprint: String,
    /// Tokens of the prompt.
    pub num_prompt_tokens: usize,
    /// Most tokens of the reply: what the request allows, cut to the room that the prompt leaves.
    pub max_tokens: usize,
}

/// Options of a streamed answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamOptions {
    /// One more chunk with the usage.
    pub include_usage: bool,
    /// Usage in every chunk.
    pub continuous_usage_stats: bool,
    /// Comments in long silences; off for clients that parse every line as JSON.
    pub heartbeat: bool,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self { include_usage: false, continuous_usage_stats: false, heartbeat: true }
    }
}

/// The form of an answer; one reply may be answered in several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// In one piece.
    Plain,
    /// As server-sent events.
    Streamed(StreamOptions),
}

/// One reply: its names, its log, and the way to its pump.
#[derive(Debug)]
pub struct ReplyStream {
    /// Its name in URLs.
    pub id: StreamId,
    /// What the names of its events begin with.
    pub tag: StreamTag,
    /// Whose it is.
    pub owner: Owner,
    /// In whose share it is kept; `owner` alone says who may read it.
    pub client: Client,
    /// The client's own name for the request.
    pub key: Option<RequestKey>,
    /// What every answer repeats.
    pub head: ReplyHead,
    /// The form that the request asked for.
    pub form: Form,
    /// What was said.
    pub log: EventLog,
    abort: watch::Sender<Option<AbortReason>>,
    is_promised: AtomicBool,
    was_streamed: AtomicBool,
    questions: mpsc::Sender<oneshot::Sender<Progress>>,
}

/// The pump's ends of a [`ReplyStream`]'s channels.
#[derive(Debug)]
pub struct Wishes {
    /// Why to stop, once that was asked for.
    pub abort: watch::Receiver<Option<AbortReason>>,
    /// Who wants to know how far it is.
    pub questions: mpsc::Receiver<oneshot::Sender<Progress>>,
}

impl ReplyStream {
    /// A reply that has no pump yet.
    pub fn new(
        id: StreamId,
        owner: Owner,
        client: Client,
        key: Option<RequestKey>,
        head: ReplyHead,
        form: Form,
        log: EventLog,
    ) -> (Self, Wishes) {
        let (abort, aborted) = watch::channel(None);
        let (questions, asked) = mpsc::channel(MAX_QUESTIONS);
        let (is_promised, was_streamed) = (AtomicBool::new(false), AtomicBool::new(false));
        let tag = StreamTag::of(&id);
        let stream = Self {
            id,
            tag,
            owner,
            client,
            key,
            head,
            form,
            log,
            abort,
            is_promised,
            was_streamed,
            questions,
        };
        (stream, Wishes { abort: aborted, questions: asked })
    }

    /// Ends the reply, if it has not ended.
    pub fn abort(&self, reason: AbortReason) {
        self.abort.send_if_modified(|abort| abort.replace(reason).is_none());
    }

    /// Whether it was asked to end, though its pump may not have noticed yet.
    pub fn is_aborted(&self) -> bool {
        self.abort.borrow().is_some()
    }

    /// A client may be told to fetch the reply later: it goes on without a reader, until its time limits. Only the
    /// store says so, which counts promises.
    pub(super) fn promise(&self) {
        self.is_promised.store(true, Ordering::Release);
    }

    /// Whether a client was told to fetch the reply later.
    pub fn is_promised(&self) -> bool {
        self.is_promised.load(Ordering::Acquire)
    }

    /// A client reads it in parts from now on.
    pub fn mark_streamed(&self) {
        self.was_streamed.store(true, Ordering::Release);
    }

    /// Whether the same request under its key is a new try: it failed, as another may not, and nobody has a
    /// part of it, to which the rest of another reply could be added.
    pub fn gives_key_up(&self) -> bool {
        self.log.is_worth_another_try(self.was_streamed.load(Ordering::Acquire))
    }

    /// Whether a client can come back to it.
    pub fn is_resumable(&self) -> bool {
        self.key.is_some() || self.is_promised()
    }

    /// Whether `cursor` names a document that a reader can have read.
    pub fn has(&self, cursor: Cursor) -> bool {
        let last = match self.log.get(cursor.event) {
            None => return false,
            Some(Event::Finish { .. }) => 1,
            Some(_) => 0,
        };
        cursor.document <= last
    }

    /// How far it is; `None` once it has ended. Cancel-safe.
    pub async fn progress(&self) -> Option<Progress> {
        let (sender, receiver) = oneshot::channel();
        self.questions.try_send(sender).ok()?;
        receiver.await.ok()
    }
}
