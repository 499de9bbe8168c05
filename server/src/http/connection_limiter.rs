//! Owns the holders for connections: how many there are, how many one peer has, and who gives way when they
//! are short.
//!
//! Invariant: accepting never waits. A connection beyond the bounds takes the place of one that waits for its
//! client (for a request, or for the rest of one), the longest first and of the peer that has most; if there is
//! none, it is answered with 503 and closed.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use actix_web::ResponseError;
use actix_web::http::header;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::error::ApiError;
use crate::middleware::request_id;
use crate::principal::Peer;
use crate::stream::connection::Connection;

/// A connection and the second handle that may cut it.
const NUM_FILES_EACH: u64 = 2;
/// Open files of everything else: the model, the log, refused connections.
const NUM_OTHER_FILES: u64 = 256;
/// Refused connections that are kept open for a moment, so that their clients can read why.
const MAX_LINGERING: usize = 64;
const LINGER: Duration = Duration::from_secs(1);
/// Nothing is awaited from the client: its request is being answered.
const SERVED: u64 = 0;

/// How many connections there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Of all peers.
    pub max_total: usize,
    /// Of one peer: an IPv4 address or the /64 network of an IPv6 address.
    pub max_per_peer: usize,
}

impl ConnectionLimits {
    /// The same, within the number of files that this process may open, which is raised as far as it goes.
    pub(super) fn within_open_files(self) -> Self {
        let resource = rustix::process::Resource::Nofile;
        let mut limit = rustix::process::getrlimit(resource);
        let wanted = self.max_total as u64 * NUM_FILES_EACH + NUM_OTHER_FILES;
        if limit.current.is_some_and(|current| current < wanted) {
            limit.current = Some(limit.maximum.map_or(wanted, |maximum| maximum.min(wanted)));
            if let Err(error) = rustix::process::setrlimit(resource, limit) {
                tracing::warn!(%error, "the limit of open files can't be raised");
                limit = rustix::process::getrlimit(resource);
            }
        }
        self.within(limit.current.unwrap_or(u64::MAX))
    }

    fn within(self, num_files: u64) -> Self {
        let room = num_files.saturating_sub(NUM_OTHER_FILES) / NUM_FILES_EACH;
        let room = usize::try_from(room).unwrap_or(usize::MAX).max(1);
        if room >= self.max_total {
            return self;
        }
        tracing::warn!(
            num_files,
            max_connections = room,
            "fewer connections than --max-connections: raise the limit of open files (ulimit -n)"
        );
        // One peer leaves the same share to others.
        let scaled = self.max_per_peer.saturating_mul(room) / self.max_total.max(1);
        Self { max_total: room, max_per_peer: scaled.clamp(1, room) }
    }
}

/// Counts the connections of all workers.
#[derive(Debug)]
pub(super) struct ConnectionLimiter {
    limits: ConnectionLimits,
    start: Instant,
    num_lingering: AtomicUsize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    holders: HashMap<u64, Holder>,
    peers: HashMap<Peer, usize>,
}

#[derive(Debug)]
struct Holder {
    peer: Peer,
    /// Milliseconds after the start, from 1, since which the client is awaited, or [`SERVED`].
    awaited_since: Arc<AtomicU64>,
    connection: Weak<Connection>,
}

/// Counts one connection until it is dropped.
#[derive(Debug)]
pub(super) struct ConnectionPermit {
    limiter: Arc<ConnectionLimiter>,
    id: u64,
    awaited_since: Arc<AtomicU64>,
}

impl ConnectionLimiter {
    /// Admits connections within `limits`.
    pub(super) fn new(limits: ConnectionLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            start: Instant::now(),
            num_lingering: AtomicUsize::new(0),
            inner: Mutex::default(),
        })
    }

    /// A permit for a new connection, which waits for its first request; `None` if that is above a limit and no
    /// other connection can be closed for it.
    pub(super) fn admit(
        self: &Arc<Self>,
        address: IpAddr,
        connection: Weak<Connection>,
    ) -> Option<ConnectionPermit> {
        let peer = Peer::of(address);
        let awaited_since = Arc::new(AtomicU64::new(self.now()));
        let mut inner = self.lock();
        if inner.of(peer) >= self.limits.max_per_peer && !inner.cut_one(Some(peer)) {
            return None;
        }
        if inner.holders.len() >= self.limits.max_total {
            let largest = inner.peers.iter().max_by_key(|(_, number)| **number).map(|(peer, _)| *peer);
            if !inner.cut_one(largest) && !inner.cut_one(None) {
                return None;
            }
        }
        let id = inner.next;
        inner.next += 1;
        *inner.peers.entry(peer).or_default() += 1;
        inner.holders.insert(id, Holder { peer, awaited_since: Arc::clone(&awaited_since), connection });
        Some(ConnectionPermit { limiter: Arc::clone(self), id, awaited_since })
    }

    /// Answers a connection that was not admitted, and closes it.
    pub(super) async fn refuse(&self, mut socket: TcpStream, error: &ApiError) {
        // The socket is new: there is room for an answer in its buffer.
        if socket.write_all(answer(error).as_bytes()).await.is_err() || socket.shutdown().await.is_err() {
            return;
        }
        if self.num_lingering.fetch_add(1, Ordering::Relaxed) < MAX_LINGERING {
            // To close while bytes arrive would reset the connection, and the answer might be lost.
            let _ = tokio::time::timeout(LINGER, drain(&mut socket)).await;
        }
        self.num_lingering.fetch_sub(1, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code below panics between two changes that belong together.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }
}

impl ConnectionPermit {
    /// From now on something is awaited from the client: a request or the rest of one.
    pub(super) fn awaits_client(&self) {
        self.awaited_since.store(self.limiter.now(), Ordering::Relaxed);
    }

    /// From now on its request is being answered.
    pub(super) fn serves(&self) {
        self.awaited_since.store(SERVED, Ordering::Relaxed);
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.limiter.lock().remove(self.id);
    }
}

impl Inner {
    fn of(&self, peer: Peer) -> usize {
        self.peers.get(&peer).copied().unwrap_or_default()
    }

    /// Cuts the connection of `peer`, or of anybody, that has waited longest for its client.
    fn cut_one(&mut self, peer: Option<Peer>) -> bool {
        let waiting = self.holders.iter().filter_map(|(id, holder)| {
            let since = holder.awaited_since.load(Ordering::Relaxed);
            (since != SERVED && peer.is_none_or(|peer| holder.peer == peer)).then_some((since, *id))
        });
        let Some((_, id)) = waiting.min() else { return false };
        if let Some(connection) = self.remove(id).and_then(|holder| holder.connection.upgrade()) {
            connection.cut();
        }
        true
    }

    fn remove(&mut self, id: u64) -> Option<Holder> {
        let holder = self.holders.remove(&id)?;
        if let Some(number) = self.peers.get_mut(&holder.peer) {
            *number -= 1;
            if *number == 0 {
                self.peers.remove(&holder.peer);
            }
        }
        Some(holder)
    }
}

fn answer(error: &ApiError) -> String {
    let response = error.error_response();
    let retry_after = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let body = error.body().to_string();
    format!(
        "HTTP/1.1 {}\r\ncontent-type: application/json\r\nretry-after: {}\r\nconnection: close\r\n\
         x-request-id: {}\r\ncontent-length: {}\r\n\r\n{body}",
        response.status(),
        retry_after.unwrap_or("1"),
        request_id::random().to_str().unwrap_or_default(),
        body.len()
    )
}

async fn drain(socket: &mut TcpStream) -> io::Result<()> {
    let mut bytes = [0; 1024];
    while socket.read(&mut bytes).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(max_total: usize, max_per_peer: usize) -> Arc<ConnectionLimiter> {
        ConnectionLimiter::new(ConnectionLimits { max_total, max_per_peer })
    }

    fn admit(limiter: &Arc<ConnectionLimiter>, peer: u8) -> Option<ConnectionPermit> {
        limiter.admit([10, 0, 0, peer].into(), Weak::new())
    }

    fn has(permit: &ConnectionPermit) -> bool {
        permit.limiter.lock().holders.contains_key(&permit.id)
    }

    /// Sets that a connection has waited since the `ms`-th millisecond.
    fn since(permit: &ConnectionPermit, ms: u64) {
        permit.awaited_since.store(ms, Ordering::Relaxed);
    }

    #[test]
    fn a_peer_at_its_limit_gives_up_its_longest_waiting_connection() {
        let limiter = limiter(10, 3);
        let permits: Vec<ConnectionPermit> = (0..3).map(|_| admit(&limiter, 1).unwrap()).collect();
        for (permit, ms) in permits.iter().zip([7, 5, 9]) {
            since(permit, ms);
        }
        let other = admit(&limiter, 2).unwrap();
        since(&other, 1);
        let fourth = admit(&limiter, 1).unwrap();
        assert_eq!(permits.iter().map(has).collect::<Vec<_>>(), [true, false, true]);
        assert!(has(&other) && has(&fourth));
        for permit in [&permits[0], &permits[2], &fourth] {
            permit.serves();
        }
        assert!(admit(&limiter, 1).is_none(), "all are being served");
        permits[2].awaits_client();
        assert!(admit(&limiter, 1).is_some());
        drop(permits);
        assert_eq!(limiter.lock().holders.len(), 2, "the other's, and the fourth");
        drop((other, fourth));
        assert!(limiter.lock().peers.is_empty());
    }

    #[test]
    fn at_the_limit_of_all_the_peer_with_most_gives_way_and_then_anybody_who_waits() {
        let limiter = limiter(4, 3);
        let quiet = admit(&limiter, 1).unwrap();
        since(&quiet, 1);
        let many: Vec<ConnectionPermit> = (0..3).map(|_| admit(&limiter, 2).unwrap()).collect();
        let third = admit(&limiter, 3).unwrap();
        assert!(has(&quiet) && many.iter().filter(|permit| has(permit)).count() == 2);
        for permit in many.iter().chain([&third]) {
            permit.serves();
        }
        let fourth = admit(&limiter, 4).unwrap();
        assert!(!has(&quiet));
        fourth.serves();
        assert!(admit(&limiter, 5).is_none());
    }

    #[test]
    fn a_small_limit_of_open_files_leaves_fewer_connections_and_the_same_shares() {
        let limits = ConnectionLimits { max_total: 8192, max_per_peer: 6144 };
        assert_eq!(limits.within(1 << 20), limits);
        assert_eq!(limits.within(1024), ConnectionLimits { max_total: 384, max_per_peer: 288 });
        assert_eq!(limits.within(3), ConnectionLimits { max_total: 1, max_per_peer: 1 });
    }
}
