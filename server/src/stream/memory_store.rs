//! Owns the replies of one process.
//!
//! Invariants: ended replies are bounded in bytes and time, and who holds most gives first; replies without
//! a reader are bounded in number for each client, and so are promised ones, which are never ended for that;
//! those that run with a reader are bounded by the engine. The lock is held for a few look-ups, never over
//! an await.

mod kept;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use self::kept::{Kept, KeptReplies};
use super::event::AbortReason;
use super::names::StreamId;
use super::reply_stream::ReplyStream;
use super::store::{Registered, StreamStore};
use crate::metrics::Metrics;
use crate::principal::Client;
use crate::principal::Owner;

/// What a reply takes besides its events: names, channels, entries of the maps. Generous.
const FIXED_BYTES: usize = 2048;

/// The bounds of a [`MemoryStore`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreLimits {
    /// How long an ended reply is kept.
    pub retention: Duration,
    /// Bytes of ended replies.
    pub max_bytes: usize,
    /// Replies of one client that run without a reader; and as many more that it was promised.
    pub max_detached: usize,
}

#[derive(Debug, Default)]
struct Inner {
    streams: HashMap<StreamId, Arc<ReplyStream>>,
    keys: HashMap<(Owner, String), StreamId>,
    running: HashMap<Client, Running>,
    num_detached: usize,
    kept: KeptReplies,
}

/// The replies of one client that run and may be without a reader.
#[derive(Debug, Default)]
struct Running {
    /// Oldest first.
    detached: VecDeque<StreamId>,
    /// Promised ones, and whether they have no reader.
    promised: HashMap<StreamId, bool>,
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
        while let Some(id) = inner.kept.expire(now) {
            inner.forget(&id);
        }
        inner
    }

    fn publish(&self, inner: &Inner) {
        self.metrics.stream_store(inner.num_detached, inner.kept.num_bytes());
    }
}

impl Inner {
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

    /// Notes that a reply has a reader, or needs none; returns whether it had none.
    fn attach(&mut self, stream: &ReplyStream) -> bool {
        let Some(running) = self.running.get_mut(&stream.client) else { return false };
        let before = running.detached.len();
        running.detached.retain(|id| *id != stream.id);
        let promised = running.promised.get_mut(&stream.id);
        let was_detached = running.detached.len() < before || promised.is_some_and(std::mem::take);
        self.num_detached -= usize::from(was_detached);
        self.tidy(stream.client);
        was_detached
    }

    /// Who has nothing has no entry.
    fn tidy(&mut self, client: Client) {
        if let Some(running) = self.running.get(&client)
            && running.detached.is_empty()
            && running.promised.is_empty()
        {
            self.running.remove(&client);
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

    fn withdraw(&self, stream: &Arc<ReplyStream>) {
        self.lock().forget(&stream.id);
    }

    fn promise(&self, stream: &Arc<ReplyStream>) -> bool {
        let mut inner = self.lock();
        if stream.is_promised() {
            return true;
        }
        let num_promised = inner.running.get(&stream.client).map_or(0, |running| running.promised.len());
        // Its end would not be heard of again.
        let is_over = stream.log.has_ended() || stream.is_aborted();
        if is_over || num_promised >= self.limits.max_detached {
            return false;
        }
        let was_detached = inner.attach(stream);
        inner.num_detached += usize::from(was_detached);
        let running = inner.running.entry(stream.client).or_default();
        running.promised.insert(stream.id.clone(), was_detached);
        stream.promise();
        true
    }

    fn set_detached(&self, stream: &Arc<ReplyStream>, is_detached: bool) {
        let mut inner = self.lock();
        inner.attach(stream);
        if is_detached {
            inner.num_detached += 1;
            let running = inner.running.entry(stream.client).or_default();
            if let Some(is_detached) = running.promised.get_mut(&stream.id) {
                *is_detached = true;
            } else {
                running.detached.push_back(stream.id.clone());
                let is_over = running.detached.len() > self.limits.max_detached;
                if let Some(oldest) = is_over.then(|| running.detached.pop_front()).flatten() {
                    inner.num_detached -= 1;
                    if let Some(oldest) = inner.streams.get(&oldest) {
                        oldest.abort(AbortReason::TooManyDetached);
                    }
                }
            }
            inner.tidy(stream.client);
        }
        self.publish(&inner);
    }

    fn ended(&self, stream: &Arc<ReplyStream>) {
        let mut inner = self.lock();
        inner.attach(stream);
        if let Some(running) = inner.running.get_mut(&stream.client) {
            running.promised.remove(&stream.id);
        }
        inner.tidy(stream.client);
        if stream.is_resumable() {
            let kept = Kept {
                id: stream.id.clone(),
                client: stream.client,
                num_bytes: stream.log.num_bytes() + FIXED_BYTES,
                is_promised: stream.is_promised(),
                expires: Instant::now() + self.limits.retention,
            };
            for id in inner.kept.insert(kept, self.limits.max_bytes) {
                inner.forget(&id);
            }
        } else {
            inner.forget(&stream.id);
        }
        self.publish(&inner);
    }

    fn sweep(&self) {
        let inner = self.lock();
        self.publish(&inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;
    use crate::stream::event::{Event, StreamError};
    use crate::stream::event_log::{LogLimits, LogWriter, event_log};
    use crate::stream::names::RequestKey;
    use crate::stream::reply_stream::{Form, ReplyHead, Wishes};

    fn store() -> MemoryStore {
        let metrics = Arc::new(Metrics::new(&fixtures::chatglm3().manifest()).unwrap());
        let limits = StoreLimits { retention: Duration::from_secs(60), max_bytes: 1 << 20, max_detached: 2 };
        MemoryStore::new(limits, metrics)
    }

    /// A reply of `client` under the key `key`, registered.
    fn register(store: &MemoryStore, client: &str, key: &str) -> (Registered, LogWriter, Wishes) {
        let (writer, log) = event_log(LogLimits { max_events: 10, max_bytes: 10 });
        let head = ReplyHead {
            id: String::new(),
            created: 0,
            model: String::new(),
            fingerprint: String::new(),
            num_prompt_tokens: 1,
            max_tokens: 1,
        };
        let key = RequestKey { key: key.to_owned(), fingerprint: [0; 32] };
        let (id, client) = (StreamId::random().unwrap(), Client::Key(Owner::of(client)));
        let (stream, wishes) =
            ReplyStream::new(id, Owner::ANYBODY, client, Some(key), head, Form::Plain, log);
        (store.register(stream), writer, wishes)
    }

    fn new(store: &MemoryStore, client: &str, key: &str) -> (Arc<ReplyStream>, LogWriter, Wishes) {
        match register(store, client, key) {
            (Registered::New(stream), writer, wishes) => (stream, writer, wishes),
            (Registered::Existing(_), ..) => panic!("{key} is taken"),
        }
    }

    #[test]
    fn a_reply_that_was_refused_is_gone_and_its_joiners_hear_why() {
        let store = store();
        let (refused, writer, _) = new(&store, "a", "k");
        let (joined, ..) = register(&store, "a", "k");
        let Registered::Existing(joined) = joined else { panic!("the key was free") };
        store.withdraw(&refused);
        let (again, ..) = new(&store, "a", "k");
        writer.close(Event::Error(StreamError::Lost));
        assert_eq!(joined.log.get(0), Some(Event::Error(StreamError::Lost)));
        // What withdrew the first does not touch the second.
        store.withdraw(&refused);
        assert!(Arc::ptr_eq(&store.find_key(Owner::ANYBODY, "k").unwrap(), &again));
        assert!(store.find(Owner::ANYBODY, &refused.id).is_none());
        assert_eq!(store.lock().kept.num_bytes(), 0);
    }

    #[test]
    fn promises_are_counted_apart_and_kept() {
        let store = store();
        let promised = ["p", "q"].map(|key| new(&store, "a", key));
        for (stream, ..) in &promised {
            assert!(store.promise(stream) && store.promise(stream));
            store.set_detached(stream, true);
        }
        let one_more = new(&store, "a", "r");
        assert!(!store.promise(&one_more.0), "as many as may run without a reader");
        assert!(store.promise(&new(&store, "b", "r of b").0), "of another client");
        let detached = ["1", "2", "3"].map(|key| new(&store, "a", key));
        for (stream, ..) in &detached {
            store.set_detached(stream, true);
        }
        let aborted = |(stream, ..): &(Arc<ReplyStream>, LogWriter, Wishes)| stream.is_aborted();
        assert_eq!(promised.each_ref().map(aborted), [false, false]);
        assert_eq!(detached.each_ref().map(aborted), [true, false, false]);
        assert!(!store.promise(&detached[0].0), "it is about to end");
        assert_eq!(store.lock().num_detached, 4);
        // An end makes room for the next promise; the reply itself is kept.
        let [(first, writer, _), _] = promised;
        writer.close(Event::Error(StreamError::Lost));
        assert!(!store.promise(&one_more.0));
        store.ended(&first);
        assert!(store.promise(&one_more.0));
        assert!(store.find(Owner::ANYBODY, &first.id).is_some());
        assert_eq!(store.lock().num_detached, 3);
    }

    #[test]
    fn nothing_is_left_of_who_has_gone() {
        let store = store();
        for (key, is_promised) in [("1", true), ("2", false)] {
            let (stream, writer, _) = new(&store, "a", key);
            store.set_detached(&stream, true);
            assert!(!is_promised || store.promise(&stream), "even one that was left before");
            assert_eq!(store.lock().num_detached, 1);
            store.set_detached(&stream, false);
            store.set_detached(&stream, true);
            drop(writer);
            assert!(!store.promise(&stream) || is_promised, "it has ended");
            store.ended(&stream);
        }
        let inner = store.lock();
        assert_eq!((inner.num_detached, inner.running.len(), inner.streams.len()), (0, 0, 2));
    }
}
