//! Owns the replies of one process.
//!
//! Invariants: finished replies are bounded in bytes and time, oldest out first; replies without a
//! reader are bounded in number for each owner; those that run with a reader are bounded by the
//! engine. The lock is held for a few look-ups, never over an await.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::event::AbortReason;
use super::reply_stream::ReplyStream;
use super::store::{Owner, Registered, StreamId, StreamStore};
use crate::metrics::Metrics;

/// What a reply takes besides its events: names, channels, entries of the maps. Generous.
const FIXED_BYTES: usize = 2048;

/// The bounds of a [`MemoryStore`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreLimits {
    /// How long a finished reply is kept.
    pub retention: Duration,
    /// Bytes of finished replies.
    pub max_bytes: usize,
    /// Replies of one owner that run without a reader.
    pub max_detached: usize,
}

/// A finished reply.
#[derive(Debug)]
struct Kept {
    expires: Instant,
    num_bytes: usize,
    id: StreamId,
}

#[derive(Debug, Default)]
struct Inner {
    streams: HashMap<StreamId, Arc<ReplyStream>>,
    keys: HashMap<(Owner, String), StreamId>,
    /// Oldest first.
    detached: HashMap<Owner, VecDeque<StreamId>>,
    num_detached: usize,
    /// Oldest first, which is also the order in which they expire.
    kept: VecDeque<Kept>,
    num_kept_bytes: usize,
}

/// Replies in memory.
#[derive(Debug)]
pub struct MemoryStore {
    limits: StoreLimits,
    metrics: Arc<Metrics>,
    inner: Mutex<Inner>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new(limits: StoreLimits, metrics: Arc<Metrics>) -> Self {
        Self { limits, metrics, inner: Mutex::default() }
    }

    /// The maps, without what has expired.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code below panics between two changes that belong together.
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        while inner.kept.front().is_some_and(|kept| kept.expires <= now) {
            inner.drop_oldest();
        }
        inner
    }

    fn publish(&self, inner: &Inner) {
        self.metrics.stream_store(inner.num_detached, inner.num_kept_bytes);
    }
}

impl Inner {
    fn drop_oldest(&mut self) {
        if let Some(kept) = self.kept.pop_front() {
            self.num_kept_bytes -= kept.num_bytes;
            self.forget(&kept.id);
        }
    }

    fn forget(&mut self, id: &StreamId) {
        if let Some(stream) = self.streams.remove(id) {
            let Some(key) = &stream.key else { return };
            let name = (stream.owner, key.key.clone());
            // Another try may have the key by now.
            if self.keys.get(&name) == Some(id) {
                self.keys.remove(&name);
            }
        }
    }

    fn attach(&mut self, stream: &ReplyStream) {
        let Some(detached) = self.detached.get_mut(&stream.owner) else { return };
        let before = detached.len();
        detached.retain(|id| *id != stream.id);
        self.num_detached -= before - detached.len();
        if detached.is_empty() {
            self.detached.remove(&stream.owner);
        }
    }
}

impl StreamStore for MemoryStore {
    fn register(&self, stream: ReplyStream) -> Registered {
        let mut inner = self.lock();
        if let Some(key) = &stream.key {
            let name = (stream.owner, key.key.clone());
            let existing = inner.keys.get(&name).and_then(|id| inner.streams.get(id));
            let is_new_try =
                |existing: &&Arc<ReplyStream>| existing.gives_key_up() && existing.key.as_ref() == Some(key);
            if let Some(existing) = existing.filter(|existing| !is_new_try(existing)) {
                return Registered::Existing(Arc::clone(existing));
            }
            inner.keys.insert(name, stream.id.clone());
        }
        let stream = Arc::new(stream);
        inner.streams.insert(stream.id.clone(), Arc::clone(&stream));
        Registered::New(stream)
    }

    fn find(&self, owner: Owner, id: &StreamId) -> Option<Arc<ReplyStream>> {
        self.lock().streams.get(id).filter(|stream| stream.owner == owner).cloned()
    }

    fn find_key(&self, owner: Owner, key: &str) -> Option<Arc<ReplyStream>> {
        let inner = self.lock();
        let id = inner.keys.get(&(owner, key.to_owned()))?;
        inner.streams.get(id).cloned()
    }

    fn set_detached(&self, stream: &Arc<ReplyStream>, is_detached: bool) {
        let mut inner = self.lock();
        inner.attach(stream);
        if is_detached {
            let detached = inner.detached.entry(stream.owner).or_default();
            detached.push_back(stream.id.clone());
            let oldest = (detached.len() > self.limits.max_detached).then(|| detached.pop_front());
            inner.num_detached += 1;
            if let Some(oldest) = oldest.flatten() {
                inner.num_detached -= 1;
                if let Some(oldest) = inner.streams.get(&oldest) {
                    oldest.abort(AbortReason::TooManyDetached);
                }
            }
        }
        self.publish(&inner);
    }

    fn ended(&self, stream: &Arc<ReplyStream>) {
        let num_bytes = stream.log.num_bytes() + FIXED_BYTES;
        let mut inner = self.lock();
        inner.attach(stream);
        if !stream.is_resumable() || num_bytes > self.limits.max_bytes {
            inner.forget(&stream.id);
        } else {
            while inner.num_kept_bytes + num_bytes > self.limits.max_bytes {
                inner.drop_oldest();
            }
            inner.num_kept_bytes += num_bytes;
            let expires = Instant::now() + self.limits.retention;
            inner.kept.push_back(Kept { expires, num_bytes, id: stream.id.clone() });
        }
        self.publish(&inner);
    }

    fn sweep(&self) {
        let inner = self.lock();
        self.publish(&inner);
    }
}
