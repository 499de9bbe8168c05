//! Owns what the two sides of a connection tell each other about the exchange in progress: one request
//! and its answer.
//!
//! Invariant: an exchange ends when its answer was handed over to the last byte, and only then does the
//! next one begin. It lives on the one thread that serves its connection.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::web::Bytes;

use super::connection_limiter::ConnectionPermit;

/// Why what a client sent is no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Malformed {
    /// The request line or a header; what is wrong with it.
    Head(&'static str),
    /// The head does not end within the limit of bytes.
    HeadTooLarge(usize),
    /// The head did not arrive within so many seconds.
    HeadTimeout(u64),
    /// The body does not keep to the coding that the head announced.
    Body,
}

/// The state of the exchange in progress on one connection.
#[derive(Debug, Default)]
pub(crate) struct Exchange {
    in_progress: Cell<bool>,
    is_received: Cell<bool>,
    is_last: Cell<bool>,
    malformed: Cell<Option<Malformed>>,
    waker: RefCell<Option<Waker>>,
    /// Hears whether the client or the server is awaited.
    permit: Option<ConnectionPermit>,
}

impl Exchange {
    /// That of a connection with this permit.
    pub(super) fn new(permit: ConnectionPermit) -> Self {
        Self { permit: Some(permit), ..Self::default() }
    }

    /// A request begins.
    pub(super) fn begin(&self) {
        self.in_progress.set(true);
        self.is_received.set(false);
        // For the rest of it.
        self.permit.iter().for_each(ConnectionPermit::awaits_client);
    }

    /// The request was received to its end.
    pub(super) fn received(&self) {
        self.is_received.set(true);
        self.permit.iter().for_each(ConnectionPermit::serves);
    }

    /// What follows on this connection is no request.
    pub(super) fn refuse(&self, malformed: Malformed) {
        self.malformed.set(Some(malformed));
        self.is_last.set(true);
    }

    /// The connection closes after this answer.
    pub(super) fn set_last(&self) {
        self.is_last.set(true);
    }

    /// Whether a request is being answered.
    pub(super) fn in_progress(&self) -> bool {
        self.in_progress.get()
    }

    /// Whether the request was received to its end.
    pub(super) fn is_received(&self) -> bool {
        self.is_received.get()
    }

    /// Whether the last answer of this connection is complete.
    pub(super) fn is_over(&self) -> bool {
        self.is_last.get() && !self.in_progress.get()
    }

    /// Why what was sent is no request, if it is none.
    pub(super) fn malformed(&self) -> Option<Malformed> {
        self.malformed.get()
    }

    /// Wakes `waker` when this answer is complete.
    pub(super) fn wake_at_end(&self, waker: &Waker) {
        let mut known = self.waker.borrow_mut();
        if !known.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *known = Some(waker.clone());
        }
    }

    fn end(&self) {
        self.in_progress.set(false);
        // For the next one.
        self.permit.iter().for_each(ConnectionPermit::awaits_client);
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }
}

/// The body of an answer. Whoever sends it drops it once it has all of it, which ends the exchange.
pub(super) struct AnswerBody {
    body: BoxBody,
    exchange: Rc<Exchange>,
}

impl AnswerBody {
    /// The body of the answer that `exchange` waits for.
    pub(super) fn new(body: BoxBody, exchange: Rc<Exchange>) -> Self {
        Self { body, exchange }
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        self.exchange.end();
    }
}

impl MessageBody for AnswerBody {
    type Error = Box<dyn Error>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Self::Error>>> {
        Pin::new(&mut self.body).poll_next(context)
    }
}
