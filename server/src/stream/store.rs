//! Owns the seam to where replies are found again: by their own name, or by the client's key.
//!
//! Invariant: a reply is found only by the owner who made it. Must not know how or where replies are
//! kept: one process keeps them in memory; replicas may share them.

use std::fmt;
use std::sync::Arc;

use super::names::StreamId;
use super::reply_stream::ReplyStream;
use crate::principal::Owner;

/// What became of a reply that was to be registered.
#[derive(Debug)]
pub enum Registered {
    /// It is new, and the caller has to start it.
    New(Arc<ReplyStream>),
    /// Its key names this one already.
    Existing(Arc<ReplyStream>),
}

/// Where replies are found again. Calls are short and never wait.
pub trait StreamStore: fmt::Debug + Send + Sync {
    /// Registers a reply, unless its owner's key names one already: of two at once, one is new. See
    /// [`ReplyStream::gives_key_up`].
    fn register(&self, stream: ReplyStream) -> Registered;

    /// A reply was refused before it started: it can no longer be found, and its key is free. A reader that found it already
    /// hears of the refusal from its log.
    fn withdraw(&self, stream: &Arc<ReplyStream>);

    /// Whether a client may be told to fetch this running reply later. If so, it goes on without a reader until
    /// its own time limits, and its end is kept before others of the same client.
    fn promise(&self, stream: &Arc<ReplyStream>) -> bool;

    /// The reply of this name, if it is this owner's.
    fn find(&self, owner: Owner, id: &StreamId) -> Option<Arc<ReplyStream>>;

    /// The reply that this owner's key names.
    fn find_key(&self, owner: Owner, key: &str) -> Option<Arc<ReplyStream>>;

    /// The last reader of a reply that goes on has left, or the first has come back.
    fn set_detached(&self, stream: &Arc<ReplyStream>, is_detached: bool);

    /// A reply has ended: from now on it is kept for the retention time, or not at all.
    fn ended(&self, stream: &Arc<ReplyStream>);

    /// Forgets what may no longer be asked for.
    fn sweep(&self);
}
