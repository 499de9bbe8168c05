//! Owns the HTTP server below the routes: its workers, the time limits of its connections, and when a
//! connection closes.
//!
//! Invariant: an answer after which the connection closes says `Connection: close`, and nothing behind it is
//! answered; every other connection can be used again. Must not know routes.

mod connection_limiter;
mod exchange;
mod request_gate;

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use actix_http::error::DispatchError;
use actix_http::{ConnectionType, HttpService, Request, Response, ServiceConfig};
use actix_server::{Server, ServerBuilder};
use actix_service::{
    IntoServiceFactory, Service, ServiceFactory, ServiceFactoryExt, apply_fn_factory, fn_service, map_config,
};
use actix_web::ResponseError;
use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{AppConfig, ServiceResponse};
use actix_web::http::Version;
use tokio::net::TcpStream;

use self::connection_limiter::ConnectionLimiter;
pub use self::connection_limiter::ConnectionLimits;
pub(crate) use self::exchange::Malformed;
use self::exchange::{AnswerBody, Exchange};
use self::request_gate::RequestGate;
use crate::error::ApiError;
use crate::middleware::request_id;
use crate::stream::connection::Connection;

/// HTTP is a small part of the work; the engine has the other cores.
const NUM_WORKERS: usize = 2;
/// Threads a worker has to parse and tokenise large bodies; more would take the engine's cores.
const NUM_BLOCKING_THREADS: usize = 1;
/// Above what load balancers commonly keep (60 s), so that they close first and no request is lost.
const KEEP_ALIVE: Duration = Duration::from_secs(75);
/// How long a client may take to read on after an answer to a request that was not read to its end.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long requests that the drain did not wait for may take to end.
const STOP_TIMEOUT_S: u64 = 5;

/// What the server is told of requests that reach no route, and asks before each answer.
pub(crate) trait Watch: Clone + Send + 'static {
    /// A request was refused with this error.
    fn refused(&self, error: &ApiError);

    /// A connection was opened.
    fn opened(&self, connection: &Arc<Connection>);

    /// Whether connections are let go.
    fn is_draining(&self) -> bool;
}

/// A server of `app` on `listener`.
///
/// # Errors
/// The socket cannot be used.
pub(crate) fn listen<F, I, S, B>(
    listener: TcpListener,
    app: F,
    watch: impl Watch,
    limits: ConnectionLimits,
) -> io::Result<Server>
where
    F: Fn() -> I + Clone + Send + 'static,
    I: IntoServiceFactory<S, Request>,
    S: ServiceFactory<Request, Config = AppConfig, Response = ServiceResponse<B>, Error = actix_web::Error>
        + 'static,
    S::InitError: fmt::Debug,
    S::Service: 'static,
    <S::Service as Service<Request>>::Future: 'static,
    B: MessageBody + 'static,
{
    let limiter = ConnectionLimiter::new(limits.within_open_files());
    let builder = ServerBuilder::new()
        .workers(NUM_WORKERS)
        .worker_max_blocking_threads(NUM_BLOCKING_THREADS)
        // No limit: to accept must not wait for anybody. The limiter has the limits.
        .max_concurrent_connections(usize::MAX / 2)
        .disable_signals()
        .shutdown_timeout(STOP_TIMEOUT_S);
    let shutdown = builder.graceful_shutdown_signal();
    let builder = builder.listen("http", listener, move || {
        let (shutdown, watch, limiter) = (shutdown.clone(), watch.clone(), Arc::clone(&limiter));
        let (opened, refused) = (watch.clone(), watch.clone());
        let app = apply_fn_factory(app(), move |request: Request, app: &S::Service| {
            let exchange = request.conn_data::<Rc<Exchange>>().cloned().unwrap_or_default();
            let is_old = request.head().version < Version::HTTP_11;
            let asked_to_close = request.head().connection_type() == ConnectionType::Close;
            let answer = exchange.malformed().is_none().then(|| app.call(request));
            let watch = watch.clone();
            async move {
                let answer = match answer {
                    Some(answer) => answered(answer, &exchange).await,
                    None => None,
                };
                let mut answer = answer.unwrap_or_else(|| refusal(&exchange, &watch));
                let head = answer.head_mut();
                // HTTP/1.0 knows no chunks: a stream of unknown length ends with its connection.
                head.no_chunking(is_old);
                let unread = !exchange.is_received();
                if is_old || asked_to_close || unread || watch.is_draining() || exchange.malformed().is_some()
                {
                    head.set_connection_type(ConnectionType::Close);
                }
                if head.connection_type() == ConnectionType::Close {
                    exchange.set_last();
                }
                Ok::<_, actix_web::Error>(answer.map_body(|_, body| AnswerBody::new(body, exchange)))
            }
        });
        let app = app.map_err(|error| error.error_response());
        let service = HttpService::build()
            .graceful_shutdown_signal(move || {
                let shutdown = shutdown.clone();
                async move { shutdown.notified().await }
            })
            .keep_alive(KEEP_ALIVE)
            // The gate times every head.
            .client_request_timeout(Duration::ZERO)
            .client_disconnect_timeout(DISCONNECT_TIMEOUT)
            // A client that closed its side is gone: its handler is dropped, which aborts its request.
            .h1_allow_half_closed(false)
            .on_connect_ext(move |gate: &RequestGate, extensions| {
                extensions.insert(Rc::clone(gate.exchange()));
                opened.opened(gate.connection());
                extensions.insert(Arc::clone(gate.connection()));
            })
            .h1(map_config(app, |()| AppConfig::default()));
        let config = ServiceConfig::default();
        fn_service(move |socket: TcpStream| {
            let (config, limiter, refused) = (config.clone(), Arc::clone(&limiter), refused.clone());
            async move {
                // Without it the client is served all the same.
                let _ = socket.set_nodelay(true);
                let address = socket.peer_addr().ok();
                let ip =
                    address.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |address: SocketAddr| address.ip());
                // Without a second handle (no descriptors left) it could not be cut.
                let admitted = Connection::of(&socket).and_then(|connection| {
                    Some((limiter.admit(ip, Arc::downgrade(&connection))?, connection))
                });
                let Some((permit, connection)) = admitted else {
                    let error = ApiError::too_many_connections();
                    refused.refused(&error);
                    limiter.refuse(socket, &error).await;
                    return Err(DispatchError::Io(io::ErrorKind::ConnectionRefused.into()));
                };
                Ok((RequestGate::new(socket, config, Exchange::new(permit), connection), address))
            }
        })
        .and_then(service)
    })?;
    Ok(builder.run())
}

/// The app's answer; `None` if the rest of the request turned out to be malformed before it.
async fn answered<B: MessageBody + 'static>(
    answer: impl Future<Output = Result<ServiceResponse<B>, actix_web::Error>>,
    exchange: &Exchange,
) -> Option<Response<BoxBody>> {
    // The task that polls this reads from the gate before.
    let malformed = poll_fn(|_| if exchange.malformed().is_some() { Poll::Ready(()) } else { Poll::Pending });
    let answer = tokio::select! {
        biased;
        () = malformed => return None,
        answer = answer => answer,
    };
    Some(match answer {
        Ok(answer) => answer.map_into_boxed_body().into(),
        Err(error) => error.error_response().into(),
    })
}

fn refusal(exchange: &Exchange, watch: &impl Watch) -> Response<BoxBody> {
    let error = match exchange.malformed() {
        Some(malformed) => ApiError::malformed_http(malformed),
        None => ApiError::internal("a request was not answered"),
    };
    watch.refused(&error);
    tracing::debug!(code = error.code(), "refused: {error}");
    let mut response = error.error_response();
    response.headers_mut().insert(request_id::NAME, request_id::random());
    response.into()
}
