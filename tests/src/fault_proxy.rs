//! Owns a TCP proxy that breaks what passes through it, as networks do, but by a seed.
//!
//! Invariant: what it delivers is a prefix of what was sent: it delays, splits, stalls and cuts, and never
//! changes, reorders or invents a byte. A connection's faults depend on the seed and the connection's number.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};

use glm_simulator::rng::Rng;

/// Of requests few break, and early: they are short.
const UP_BREAKS_ONE_IN: usize = 6;
const UP_REACH: usize = 1024;
/// Most answers break, anywhere in what a short stream sends.
const DOWN_BREAKS_ONE_IN: usize = 1;
const DOWN_REACH: usize = 8192;
const MAX_CHUNK: usize = 16_384;
const MAX_DELAY_MS: usize = 2;

/// What happens at a chosen byte of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Break {
    /// The connection closes in good order.
    Fin,
    /// The connection is reset.
    Reset,
    /// Nothing passes any more in this direction, and nobody is told.
    Stall,
}

/// The fate of one direction of one connection.
#[derive(Debug)]
struct Fate {
    /// Where it breaks, counted in bytes from the connection's beginning.
    breaks_at: Option<(usize, Break)>,
    /// The most bytes that pass at once.
    max_chunk: usize,
    /// The longest delay of a chunk.
    max_delay_ms: usize,
    rng: Rng,
}

impl Fate {
    /// One direction in `one_in` breaks, somewhere in its first `reach` bytes.
    fn new(rng: &mut Rng, one_in: usize, reach: usize) -> Self {
        let mut rng = Rng::new(rng.next_u64());
        let breaks_at = rng.one_in(one_in).then(|| {
            let kind = match rng.range(0..=9) {
                0..=4 => Break::Fin,
                5..=8 => Break::Reset,
                _ => Break::Stall,
            };
            (rng.range(0..=reach), kind)
        });
        let max_chunk = if rng.one_in(4) { rng.range(1..=64) } else { MAX_CHUNK };
        let max_delay_ms = if rng.one_in(8) { MAX_DELAY_MS } else { 0 };
        Self { breaks_at, max_chunk, max_delay_ms, rng }
    }
}

/// What was done so far.
#[derive(Debug, Default)]
pub struct Counts {
    /// Connections that were accepted.
    pub connections: AtomicU64,
    /// Connections that were closed too early.
    pub fins: AtomicU64,
    /// Connections that were reset.
    pub resets: AtomicU64,
    /// Connections that fell silent.
    pub stalls: AtomicU64,
}

/// A running proxy; it ends with the runtime.
#[derive(Debug)]
pub struct FaultProxy {
    /// Where it listens.
    pub address: SocketAddr,
    /// What it did.
    pub counts: Arc<Counts>,
}

impl FaultProxy {
    /// A proxy before `upstream`.
    ///
    /// # Errors
    /// No port can be had.
    pub async fn start(upstream: SocketAddr, seed: u64) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let proxy = Self { address: listener.local_addr()?, counts: Arc::default() };
        let counts = Arc::clone(&proxy.counts);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = counts.connections.fetch_add(1, Ordering::Relaxed);
                let mut rng = Rng::new(seed ^ number.wrapping_mul(0xd134_2543_de82_ef95));
                let up = Fate::new(&mut rng, UP_BREAKS_ONE_IN, UP_REACH);
                let down = Fate::new(&mut rng, DOWN_BREAKS_ONE_IN, DOWN_REACH);
                tokio::spawn(pass(client, upstream, up, down, Arc::clone(&counts)));
            }
        });
        Ok(proxy)
    }
}

/// Passes one connection until either side closes or a fault ends it; then both sides are closed.
async fn pass(mut client: TcpStream, upstream: SocketAddr, up: Fate, down: Fate, counts: Arc<Counts>) {
    let Ok(mut server) = TcpStream::connect(upstream).await else { return };
    for side in [&client, &server] {
        let _ = side.set_nodelay(true);
    }
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let fault = tokio::select! {
        fault = copy(&mut from_client, &mut to_server, up, &counts) => fault,
        fault = copy(&mut from_server, &mut to_client, down, &counts) => fault,
    };
    match fault {
        Some(Break::Fin) => {
            counts.fins.fetch_add(1, Ordering::Relaxed);
        }
        Some(Break::Reset) => {
            counts.resets.fetch_add(1, Ordering::Relaxed);
            // Closing without lingering sends RST.
            for side in [&client, &server] {
                let _ = side.set_zero_linger();
            }
        }
        Some(Break::Stall) | None => {}
    }
}

/// Passes one direction on; returns the fault that ended it, or `None` when a side closed.
async fn copy(
    from: &mut ReadHalf<'_>,
    to: &mut WriteHalf<'_>,
    mut fate: Fate,
    counts: &Counts,
) -> Option<Break> {
    let mut buffer = vec![0; fate.max_chunk];
    let mut passed = 0;
    let mut stalled = false;
    loop {
        let length = from.read(&mut buffer).await.unwrap_or(0);
        if length == 0 {
            return None;
        }
        if stalled {
            continue;
        }
        if fate.max_delay_ms > 0 {
            tokio::time::sleep(Duration::from_millis(fate.rng.range(0..=fate.max_delay_ms) as u64)).await;
        }
        let fault = fate.breaks_at.filter(|(at, _)| *at < passed + length);
        let allowed = fault.map_or(length, |(at, _)| at - passed);
        to.write_all(&buffer[..allowed]).await.ok()?;
        passed += allowed;
        match fault {
            Some((_, Break::Stall)) => {
                counts.stalls.fetch_add(1, Ordering::Relaxed);
                stalled = true;
            }
            Some((_, kind)) => return Some(kind),
            None => {}
        }
    }
}
