//! Owns what reaches the HTTP server of actix of a client's bytes: one well-formed request at a time.
//!
//! Invariants: what is passed on was read by actix's own decoder and written anew, so that the two cannot
//! read it differently; no byte of a request is passed on before the answer to the one before it is
//! complete, and none after an answer that closes the connection; at most a head and one read are held.
//!
//! actix-http alone has four faults here. It remembers a request's `Connection: upgrade` as the state of the
//! connection, repeats it in the answer and closes. It decodes requests ahead, and answers those behind an
//! answer that said `Connection: close`. What it cannot decode it answers with an empty 400. And it times the
//! first head of a connection only.

use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use actix_http::error::ParseError;
use actix_http::h1::{Codec, Message, MessageType};
use actix_http::{ConnectionType, HttpMessage, Request, ServiceConfig};
use actix_web::http::{Method, Version, header};
use actix_web::web::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};
use tokio_util::codec::Decoder;

use super::exchange::{Exchange, Malformed};
use crate::stream::connection::Connection;

/// The longest head; what is sent ahead of its turn is held up to here as well.
const MAX_HEAD_BYTES: usize = 64 * 1024;
const READ_BYTES: usize = 8 * 1024;
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may take to notice that the connection is closing. To close it while bytes arrive
/// would reset it, and the client's system may then drop the answer unread.
const LINGER: Duration = Duration::from_secs(1);

/// Headers that concern one connection and not the request. Nothing here switches protocols.
const HOP_BY_HOP: [&str; 7] =
    ["connection", "http2-settings", "keep-alive", "proxy-connection", "te", "trailer", "upgrade"];
/// Stands for what is no request; it is answered by [`Exchange::malformed`].
const STAND_IN: &[u8] = b"GET / HTTP/1.1\r\nhost: malformed\r\nconnection: close\r\n\r\n";

/// A client's socket, as actix reads and writes it.
pub(super) struct RequestGate {
    socket: TcpStream,
    config: ServiceConfig,
    codec: Codec,
    exchange: Rc<Exchange>,
    connection: Arc<Connection>,
    /// From the client, and not decoded yet.
    received: BytesMut,
    /// Decoded, and not read by actix yet.
    passed: BytesMut,
    /// How the body being received is written, if one is.
    body: Option<Coding>,
    is_first: bool,
    /// The client sends no more.
    ended: bool,
    head_timer: Option<Pin<Box<Sleep>>>,
    linger_timer: Option<Pin<Box<Sleep>>>,
    is_shut_down: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coding {
    Chunked,
    Length,
}

impl RequestGate {
    /// The gate of a new connection. `config` is only used to decode, and shared by all connections of a worker.
    pub(super) fn new(
        socket: TcpStream,
        config: ServiceConfig,
        exchange: Exchange,
        connection: Arc<Connection>,
    ) -> Self {
        Self {
            socket,
            codec: Codec::new(config.clone()),
            config,
            exchange: Rc::new(exchange),
            connection,
            received: BytesMut::new(),
            passed: BytesMut::new(),
            body: None,
            is_first: true,
            ended: false,
            head_timer: None,
            linger_timer: None,
            is_shut_down: false,
        }
    }

    /// The second handle of the socket.
    pub(super) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// What the service that answers shares with the gate.
    pub(super) fn exchange(&self) -> &Rc<Exchange> {
        &self.exchange
    }

    /// Passes on what may be passed on of the bytes received.
    fn advance(&mut self) {
        if self.exchange.malformed().is_some() || self.exchange.is_over() {
            self.received.clear();
            return;
        }
        loop {
            if self.body.is_none() {
                if self.exchange.in_progress() {
                    return;
                }
                // Some clients send an empty line after a body, which belongs to no request.
                let num_empty = self.received.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
                self.received.advance(num_empty);
                if self.received.is_empty() {
                    // An idle connection holds no memory here.
                    self.received = BytesMut::new();
                    return;
                }
            }
            match self.codec.decode(&mut self.received) {
                Ok(Some(Message::Item(request))) => self.pass_head(&request),
                Ok(Some(Message::Chunk(part))) => self.pass_body(part.as_deref()),
                Ok(None) if self.body.is_none() && self.received.len() >= MAX_HEAD_BYTES => {
                    self.refuse(Malformed::HeadTooLarge(MAX_HEAD_BYTES));
                }
                Ok(None) => return,
                Err(_) if self.body.is_some() => self.refuse(Malformed::Body),
                Err(error) => self.refuse(match error {
                    ParseError::TooLarge => Malformed::HeadTooLarge(MAX_HEAD_BYTES),
                    ParseError::Method => Malformed::Head("the method is none"),
                    ParseError::Uri(_) => Malformed::Head("the target is no URI"),
                    ParseError::Version => Malformed::Head("the version is not HTTP/1.1 or HTTP/1.0"),
                    ParseError::Header => Malformed::Head(
                        "the request line or a header is malformed, a header is given twice or contradicts another, or \
                         Host is missing",
                    ),
                    _ => Malformed::Head("the request line or a header is malformed"),
                }),
            }
            if self.exchange.malformed().is_some() {
                self.received.clear();
                return;
            }
        }
    }

    fn pass_head(&mut self, request: &Request) {
        let head = request.head();
        self.body = match self.codec.message_type() {
            MessageType::None => None,
            MessageType::Payload if request.chunked().unwrap_or(false) => Some(Coding::Chunked),
            MessageType::Payload => Some(Coding::Length),
            // The decoder expects another protocol from here on, which no handler speaks.
            MessageType::Stream => {
                self.codec = Codec::new(self.config.clone());
                if head.method == Method::CONNECT {
                    return self.refuse(Malformed::Head("the method CONNECT is for proxies"));
                }
                let length = head.headers.get(header::CONTENT_LENGTH);
                if length.is_some_and(|length| length.as_bytes() != b"0") {
                    return self.refuse(Malformed::Head("a WebSocket handshake has no body"));
                }
                None
            }
        };
        self.is_first = false;
        self.head_timer = None;
        self.exchange.begin();
        if self.body.is_none() {
            self.exchange.received();
        }
        let is_old = head.version < Version::HTTP_11;
        let version = if is_old { "HTTP/1.0" } else { "HTTP/1.1" };
        let mut passed = (&mut self.passed).writer();
        // Writing to memory does not fail.
        let _ = write!(passed, "{} {} {version}\r\n", head.method, head.uri);
        for (name, value) in head.headers.iter().filter(|(name, _)| !HOP_BY_HOP.contains(&name.as_str())) {
            let _ = write!(passed, "{name}: ");
            let _ = passed.write_all(value.as_bytes());
            let _ = passed.write_all(b"\r\n");
        }
        if is_old || head.connection_type() == ConnectionType::Close {
            let _ = passed.write_all(b"connection: close\r\n");
        }
        let _ = passed.write_all(b"\r\n");
    }

    /// Passes on a part of the body, or its end.
    fn pass_body(&mut self, part: Option<&[u8]>) {
        let is_chunked = self.body == Some(Coding::Chunked);
        if is_chunked {
            let _ = write!((&mut self.passed).writer(), "{:x}\r\n", part.map_or(0, <[u8]>::len));
        }
        self.passed.extend_from_slice(part.unwrap_or_default());
        if is_chunked {
            self.passed.extend_from_slice(b"\r\n");
        }
        if part.is_none() {
            self.body = None;
            self.exchange.received();
        }
    }

    fn refuse(&mut self, malformed: Malformed) {
        self.exchange.refuse(malformed);
        if !self.exchange.in_progress() {
            self.exchange.begin();
            self.exchange.received();
            self.passed.extend_from_slice(STAND_IN);
        }
    }

    /// Whether a head is overdue. Between two requests a connection may be idle; then actix has the clock.
    fn is_overdue(&mut self, context: &mut Context<'_>) -> bool {
        let is_expected = self.is_first || !self.received.is_empty();
        if !is_expected || self.exchange.in_progress() || self.body.is_some() {
            return false;
        }
        let timer = self.head_timer.get_or_insert_with(|| Box::pin(sleep(HEAD_TIMEOUT)));
        timer.as_mut().poll(context).is_ready()
    }

    /// Reads what has arrived; the number of bytes, which is 0 at the end.
    fn poll_receive(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut bytes = [MaybeUninit::uninit(); READ_BYTES];
        let mut bytes = ReadBuf::uninit(&mut bytes);
        ready!(Pin::new(&mut self.socket).poll_read(context, &mut bytes))?;
        self.received.extend_from_slice(bytes.filled());
        self.ended |= bytes.filled().is_empty();
        Poll::Ready(Ok(bytes.filled().len()))
    }
}

impl AsyncRead for RequestGate {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            this.advance();
            if !this.passed.is_empty() {
                let num_bytes = this.passed.len().min(buffer.remaining());
                buffer.put_slice(&this.passed.split_to(num_bytes));
                return Poll::Ready(Ok(()));
            }
            if this.ended || this.exchange.is_over() {
                return Poll::Ready(Ok(()));
            }
            this.exchange.wake_at_end(context.waker());
            if this.received.len() >= MAX_HEAD_BYTES {
                // A client that sends this much ahead waits for its answer.
                return Poll::Pending;
            }
            match this.poll_receive(context)? {
                Poll::Ready(_) => {}
                Poll::Pending if this.is_overdue(context) && this.received.is_empty() => {
                    // It never asked for anything, such as a connection made ahead: an answer to nothing would
                    // be taken for the answer to what it asks next.
                    this.ended = true;
                }
                Poll::Pending if this.is_overdue(context) => {
                    this.refuse(Malformed::HeadTimeout(HEAD_TIMEOUT.as_secs()));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

impl AsyncWrite for RequestGate {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    /// Closes this side, and waits a while for the other if that is still sending.
    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.is_shut_down {
            ready!(Pin::new(&mut this.socket).poll_shutdown(context))?;
            this.is_shut_down = true;
        }
        let mut is_sending = this.body.is_some() || !this.received.is_empty() || this.linger_timer.is_some();
        while !this.ended {
            this.received.clear();
            match this.poll_receive(context) {
                Poll::Ready(Ok(_)) => is_sending = true,
                Poll::Ready(Err(_)) => break,
                Poll::Pending if is_sending || this.exchange.malformed().is_some() => {
                    let timer = this.linger_timer.get_or_insert_with(|| Box::pin(sleep(LINGER)));
                    ready!(timer.as_mut().poll(context));
                    break;
                }
                Poll::Pending => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}
