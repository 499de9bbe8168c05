//! Owns the cutting of connections whose client takes no bytes.
//!
//! Invariants: the engine, the pump and other readers never notice a slow reader; what one connection
//! holds unsent is bounded by the socket's buffer and the HTTP writer's; a client that takes anything
//! within the time is not cut.

use std::any::Any;
use std::cell::Cell;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use tokio::time::Instant;
use tracing::Instrument;

/// The kernel's send buffer: seconds of text for a reader, and a bound for thousands of them.
const SEND_BUFFER_BYTES: usize = 64 * 1024;

/// Bounds what the kernel keeps for each connection that `listener` will accept, and for how long.
///
/// A stream is watched here and cut after `write_timeout`. The kernel cuts what is not seen here: the
/// last bytes of a stream, and answers in one piece.
///
/// # Errors
/// The operating system refuses.
pub fn bound_sends(listener: &TcpListener, write_timeout: Duration) -> std::io::Result<()> {
    let socket = socket2::SockRef::from(listener);
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    // Later than the watch, which counts and logs what it cuts.
    socket.set_tcp_user_timeout(Some(2 * write_timeout))
}

/// A second handle of a client's socket. Only the connection itself may own it: the socket stays open
/// as long as any handle.
#[derive(Debug)]
pub struct Connection(TcpStream);

impl Connection {
    /// The connection that HTTP was just given.
    pub fn of(io: &dyn Any) -> Option<Arc<Self>> {
        let stream = io.downcast_ref::<tokio::net::TcpStream>()?;
        // Without a second handle (no descriptors left) the client is served and can't be cut.
        let handle = stream.as_fd().try_clone_to_owned().ok()?;
        Some(Arc::new(Self(handle.into())))
    }

    /// Bytes that were written and that the other side has not acknowledged; 0 if the system does not tell.
    pub(super) fn num_unacknowledged_bytes(&self) -> usize {
        let mut num_bytes: libc::c_int = 0;
        // SAFETY: the descriptor is open as long as `self`, and the request writes one int.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TIOCOUTQ, &raw mut num_bytes) };
        if result == 0 { usize::try_from(num_bytes).unwrap_or(0) } else { 0 }
    }

    /// Ends it in both directions.
    pub(crate) fn cut(&self) {
        // It may be closed already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// A body that is watched while it is sent.
#[derive(Debug)]
pub struct Watched<S> {
    body: S,
    owed: Rc<Owed>,
}

/// Since when the connection has owed the body a poll: it polls again as soon as it has room.
type Owed = Cell<Option<Instant>>;

/// Cuts `connection` and calls `on_cut` when it asks `body` for nothing for `timeout` after it got something.
pub fn watch<S>(
    body: S,
    connection: Option<&Arc<Connection>>,
    timeout: Duration,
    on_cut: impl FnOnce() + 'static,
) -> Watched<S> {
    let owed = Rc::new(Owed::default());
    if let Some(connection) = connection {
        let (owed, connection) = (Rc::downgrade(&owed), Arc::downgrade(connection));
        let watching = async move {
            if let Some(connection) = stuck(&owed, &connection, timeout).await {
                connection.cut();
                on_cut();
            }
        };
        // What `on_cut` logs is about the request that is being answered.
        actix_web::rt::spawn(watching.in_current_span());
    }
    Watched { body, owed }
}

/// Waits until the connection is stuck; `None` once the body or the connection is gone.
async fn stuck(
    owed: &std::rc::Weak<Owed>,
    connection: &Weak<Connection>,
    timeout: Duration,
) -> Option<Arc<Connection>> {
    loop {
        let since = owed.upgrade()?.get();
        let now = Instant::now();
        let until = since.unwrap_or(now) + timeout;
        if until <= now {
            return connection.upgrade();
        }
        tokio::time::sleep_until(until).await;
    }
}

impl<S: Stream + Unpin> Stream for Watched<S> {
    type Item = S::Item;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<S::Item>> {
        self.owed.set(None);
        let item = Pin::new(&mut self.body).poll_next(context);
        if matches!(item, Poll::Ready(Some(_))) {
            self.owed.set(Some(Instant::now()));
        }
        item
    }
}
