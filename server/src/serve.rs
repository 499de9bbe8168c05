//! Owns the server's run: it listens, loads the model, serves and ends.
//!
//! Invariant: HTTP is answered from the moment that the port is bound until the last stream has ended.

use std::net::TcpListener;

use actix_web::middleware::from_fn;
use actix_web::{App, web};
use tokio::sync::mpsc;

use crate::lifecycle::{Lifecycle, Loaded};
use crate::middleware::{cors, loading, observe, paths, request_id};
use crate::serve_error::{LoadFailure, ServeError};
use crate::stream::connection;
use crate::{engine_watch, http, routes, shutdown};

/// Answers on `listener` at once, refuses requests until `loading` is done and the model warmed up, and serves then
/// until `signals` says so: once to drain, twice to end what still runs with an error, three times to go at once. A
/// closed channel is one signal. A signal before the model is ready ends the server at once: nothing was accepted.
///
/// # Errors
/// [`ServeError`]: the sockets, the loading or the first generation failed, or the engine did for good. Then every
/// stream was told first.
pub async fn serve<E: Into<LoadFailure>>(
    listener: TcpListener,
    lifecycle: web::Data<Lifecycle>,
    loading: impl Future<Output = Result<Loaded, E>>,
    mut signals: mpsc::Receiver<()>,
) -> Result<(), ServeError> {
    let shared = lifecycle.clone();
    let app = move || {
        App::new()
            .app_data(shared.clone())
            // The last one is the first to see a request.
            .wrap(from_fn(loading::refuse))
            .wrap(from_fn(cors::guard))
            .wrap(from_fn(observe::count))
            .wrap(from_fn(paths::correct))
            .wrap(from_fn(request_id::assign))
            .wrap(from_fn(loading::attach_state))
            .configure(routes::configure)
    };
    connection::bound_sends(&listener, lifecycle.options.write_timeout)?;
    let server = http::listen(listener, app, lifecycle.clone(), lifecycle.options.connection_limits)?;
    let handle = server.handle();
    tokio::pin!(server);
    let end = async {
        let state = tokio::select! {
            state = lifecycle.start(loading) => state?,
            _ = signals.recv() => return Ok(false),
        };
        tokio::select! {
            graceful = shutdown::drain(&lifecycle, &state, &mut signals) => Ok::<_, ServeError>(graceful),
            failure = engine_watch::look_after(&state) => {
                shutdown::give_up(&state, &failure).await;
                Err(failure.into())
            }
        }
    };
    let end = tokio::select! {
        result = &mut server => return Ok(result?),
        end = end => end,
    };
    // Not awaited alone: the server answers only while it is polled.
    let graceful = match &end {
        Ok(graceful) => *graceful,
        // What the streams were told is still on its way.
        Err(error) => error.is_engine_failure(),
    };
    let (result, ()) = tokio::join!(server, handle.stop(graceful));
    end?;
    Ok(result?)
}
