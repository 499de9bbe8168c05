//! Owns the memory of requests' bodies from their first byte until they are requests, and who gets it when
//! it is short.
//!
//! Invariants: a body is charged for what has arrived, never for what it announces. The first
//! [`FREE_BYTES`] of a body are always there, so a small request is never refused; the number of
//! connections bounds them. Nothing waits for memory: when it is short, a body that has stalled gives its
//! memory back, then one of a client that holds more; otherwise the new one is told to come back.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::principal::Client;

/// What any body may take without asking: most conversations fit.
pub(crate) const FREE_BYTES: usize = 16 * 1024;
/// A body that did not grow by this much...
const PROGRESS_BYTES: usize = 8 * 1024;
/// ...for this long has stalled. It is cut only when others need its memory.
const STALL: Duration = Duration::from_secs(1);

/// Why a body gets no memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BodyRefused {
    /// Others hold all there is.
    #[error("the memory for bodies is taken")]
    NoRoom,
    /// It had some, and had to give it to others.
    #[error("the body's memory went to others")]
    Cut,
}

/// Memory for bodies that are being read and converted.
#[derive(Debug)]
pub(crate) struct BodyMemory {
    start: Instant,
    /// Most bytes of one client, so that there is always room for a second.
    max_of_one: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    num_left: usize,
    next: u64,
    bodies: HashMap<u64, Charged>,
    clients: HashMap<Client, usize>,
}

/// A body that takes more than is free.
#[derive(Debug)]
struct Charged {
    client: Client,
    num_bytes: usize,
    /// It has arrived whole and is being converted, which can't be taken back.
    is_whole: bool,
    pulse: Arc<Pulse>,
}

/// What a body's reader and those who may cut it share.
#[derive(Debug, Default)]
struct Pulse {
    /// Milliseconds after the start at which the body last made progress.
    progress: AtomicU64,
    cut: Notify,
}

/// The memory of one body, given back on drop.
#[derive(Debug)]
pub(crate) struct BodyShare {
    memory: Arc<BodyMemory>,
    client: Client,
    /// Its name in the books, if it is there.
    id: Option<u64>,
    num_bytes: usize,
    num_unnoticed: usize,
    pulse: Arc<Pulse>,
}

impl BodyMemory {
    /// Room for `num_bytes` beside what is free.
    pub(crate) fn new(num_bytes: usize, now: Instant) -> Self {
        let inner = Inner { num_left: num_bytes, next: 0, bodies: HashMap::new(), clients: HashMap::new() };
        Self { start: now, max_of_one: num_bytes - num_bytes / 4, inner: Mutex::new(inner) }
    }

    /// A body of which nothing has arrived.
    pub(crate) fn open(self: &Arc<Self>, client: Client, now: Instant) -> BodyShare {
        let share = BodyShare {
            memory: Arc::clone(self),
            client,
            id: None,
            num_bytes: 0,
            num_unnoticed: 0,
            pulse: Arc::default(),
        };
        share.note_progress(now);
        share
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code below panics between two changes that belong together.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ms(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.start).as_millis()).unwrap_or(u64::MAX)
    }
}

impl BodyShare {
    /// Grows to `num_bytes` in all, before they are allocated.
    ///
    /// # Errors
    /// [`BodyRefused`]: there is no room, or no longer.
    pub(crate) fn grow(&mut self, num_bytes: usize, now: Instant) -> Result<(), BodyRefused> {
        if num_bytes <= self.num_bytes.max(FREE_BYTES) {
            return Ok(());
        }
        let num_more = num_bytes - self.num_bytes.max(FREE_BYTES);
        let memory = Arc::clone(&self.memory);
        let mut inner = memory.lock();
        if self.id.is_some_and(|id| !inner.bodies.contains_key(&id)) {
            return Err(BodyRefused::Cut);
        }
        inner.make_room(self, num_more, now)?;
        inner.num_left -= num_more;
        *inner.clients.entry(self.client).or_default() += num_more;
        let id = self.id.unwrap_or(inner.next);
        if self.id.is_none() {
            inner.next += 1;
            self.id = Some(id);
        }
        let (client, pulse) = (self.client, &self.pulse);
        let charged = inner.bodies.entry(id).or_insert_with(|| {
            let pulse = Arc::clone(pulse);
            Charged { client, num_bytes: 0, is_whole: false, pulse }
        });
        charged.num_bytes += num_more;
        self.num_bytes = num_bytes;
        Ok(())
    }

    /// So many more bytes came from the client.
    pub(crate) fn arrived(&mut self, num_bytes: usize, now: Instant) {
        self.num_unnoticed += num_bytes;
        if self.num_unnoticed >= PROGRESS_BYTES {
            self.num_unnoticed = 0;
            self.note_progress(now);
        }
    }

    /// The body has arrived whole: its memory can't be given to others before it is converted.
    ///
    /// # Errors
    /// [`BodyRefused::Cut`]: it was given away before.
    pub(crate) fn complete(&self) -> Result<(), BodyRefused> {
        let Some(id) = self.id else { return Ok(()) };
        match self.memory.lock().bodies.get_mut(&id) {
            Some(charged) => {
                charged.is_whole = true;
                Ok(())
            }
            None => Err(BodyRefused::Cut),
        }
    }

    /// Waits until the memory goes to others. Cancel-safe.
    pub(crate) async fn cut(&self) {
        self.pulse.cut.notified().await;
    }

    fn note_progress(&self, now: Instant) {
        self.pulse.progress.store(self.memory.ms(now), Ordering::Relaxed);
    }
}

impl Drop for BodyShare {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.memory.lock().remove(id);
        }
    }
}

impl Inner {
    fn of(&self, client: Client) -> usize {
        self.clients.get(&client).copied().unwrap_or_default()
    }

    /// Cuts others until `share` can have `num_more` bytes.
    fn make_room(&mut self, share: &BodyShare, num_more: usize, now: Instant) -> Result<(), BodyRefused> {
        let stalled_before = share.memory.ms(now).saturating_sub(STALL.as_millis() as u64);
        loop {
            let would_hold = self.of(share.client) + num_more;
            let is_within = would_hold <= share.memory.max_of_one;
            if is_within && num_more <= self.num_left {
                return Ok(());
            }
            let victim = self
                .bodies
                .iter()
                .filter(|(id, body)| {
                    let is_stalled = body.pulse.progress.load(Ordering::Relaxed) < stalled_before;
                    let is_mine = body.client == share.client;
                    let counts = is_stalled || self.of(body.client) > would_hold;
                    // Who is at its own limit gains nothing from what others give back.
                    !body.is_whole && share.id != Some(**id) && counts && (is_within || is_mine)
                })
                .max_by_key(|(_, body)| {
                    let age = u64::MAX - body.pulse.progress.load(Ordering::Relaxed);
                    (self.of(body.client), age)
                });
            let id = *victim.ok_or(BodyRefused::NoRoom)?.0;
            if let Some(body) = self.remove(id) {
                body.pulse.cut.notify_one();
            }
        }
    }

    fn remove(&mut self, id: u64) -> Option<Charged> {
        let body = self.bodies.remove(&id)?;
        self.num_left += body.num_bytes;
        if let Some(num_bytes) = self.clients.get_mut(&body.client) {
            *num_bytes -= body.num_bytes;
            if *num_bytes == 0 {
                self.clients.remove(&body.client);
            }
        }
        Some(body)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::principal::Owner;

    const KIB: usize = 1024;

    fn client(name: &str) -> Client {
        Client::Key(Owner::of(name))
    }

    /// Bytes that are charged for this much of a body.
    fn with_free(num_bytes: usize) -> usize {
        FREE_BYTES + num_bytes
    }

    fn is_cut(share: &BodyShare) -> bool {
        share.cut().now_or_never().is_some()
    }

    #[test]
    fn only_what_has_arrived_counts_and_small_bodies_are_free() {
        let now = Instant::now();
        let memory = Arc::new(BodyMemory::new(100 * KIB, now));
        let idle: Vec<BodyShare> = (0..1000).map(|_| memory.open(client("a"), now)).collect();
        let mut small: Vec<BodyShare> = (0..1000).map(|_| memory.open(client("a"), now)).collect();
        let mut large = memory.open(client("a"), now);
        assert_eq!(large.grow(with_free(75 * KIB), now), Ok(()));
        assert!(small.iter_mut().all(|share| share.grow(FREE_BYTES, now).is_ok()));
        assert_eq!(memory.lock().num_left, 25 * KIB);
        drop((idle, small));
        assert_eq!(memory.lock().num_left, 25 * KIB);
        drop(large);
        assert_eq!(memory.lock().num_left, 100 * KIB);
        assert!(memory.lock().clients.is_empty() && memory.lock().bodies.is_empty());
    }

    #[test]
    fn one_client_leaves_a_quarter_and_bodies_that_go_on_are_not_cut_for_its_others() {
        let now = Instant::now();
        let memory = Arc::new(BodyMemory::new(100 * KIB, now));
        let mut first = memory.open(client("a"), now);
        assert_eq!(first.grow(with_free(75 * KIB), now), Ok(()));
        let mut second = memory.open(client("a"), now);
        assert_eq!(second.grow(with_free(KIB), now), Err(BodyRefused::NoRoom));
        let mut other = memory.open(client("b"), now);
        assert_eq!(other.grow(with_free(25 * KIB), now), Ok(()));
        assert!(!is_cut(&first));
    }

    #[test]
    fn a_body_that_stalls_gives_its_memory_to_one_that_needs_it() {
        let now = Instant::now();
        let memory = Arc::new(BodyMemory::new(100 * KIB, now));
        let mut stalled = memory.open(client("a"), now);
        stalled.grow(with_free(70 * KIB), now).unwrap();
        let now = now + STALL / 2;
        let mut steady = memory.open(client("a"), now);
        steady.grow(with_free(5 * KIB), now).unwrap();
        let now = now + STALL;
        // A byte now and then is no progress.
        stalled.arrived(1, now);
        steady.arrived(PROGRESS_BYTES, now);
        let mut third = memory.open(client("a"), now);
        assert_eq!(third.grow(with_free(40 * KIB), now), Ok(()));
        assert!(is_cut(&stalled) && !is_cut(&steady));
        assert_eq!(stalled.grow(with_free(71 * KIB), now), Err(BodyRefused::Cut));
        assert_eq!(stalled.complete(), Err(BodyRefused::Cut));
        drop(stalled);
        assert_eq!(memory.lock().num_left, 55 * KIB, "counted once");
    }

    #[test]
    fn who_holds_more_gives_to_who_holds_less_but_not_what_is_whole() {
        let now = Instant::now();
        let memory = Arc::new(BodyMemory::new(100 * KIB, now));
        let mut large: Vec<BodyShare> = (0..3).map(|_| memory.open(client("a"), now)).collect();
        for (i, share) in large.iter_mut().enumerate() {
            share.grow(with_free(25 * KIB), now).unwrap();
            share.note_progress(now + Duration::from_millis(i as u64));
        }
        large[0].complete().unwrap();
        let mut other = memory.open(client("b"), now);
        // 25 KiB are left, and 25 more come from the oldest of the larger one's that is not whole.
        assert_eq!(other.grow(with_free(26 * KIB), now), Ok(()));
        assert_eq!(large.iter().map(is_cut).collect::<Vec<_>>(), [false, true, false]);
        // Now both would hold about the same.
        assert_eq!(other.grow(with_free(60 * KIB), now), Err(BodyRefused::NoRoom));
        assert_eq!(other.grow(with_free(50 * KIB), now), Ok(()));
    }
}
