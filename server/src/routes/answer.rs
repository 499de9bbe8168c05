//! Owns the way from a reply to an answer: when the headers leave, and in which form the rest follows.
//!
//! Invariant: headers are held until the reply has said something, has ended, or the hold is over; so
//! an early failure has a real status and a late one an event, and no client waits for either.
//!
//! A plain answer that may outlast a proxy's time limit has a way out: `Prefer: respond-async` gives
//! 202 and a Location where the answer can be fetched, waited for again, or read as a stream. The
//! alternatives are worse: white space as a keep-alive commits to 200 before the outcome is known,
//! which is the very mistake that this server exists to end; and to stream inside while the client
//! gets silence changes nothing for the proxy.

use std::convert::Infallible;
use std::sync::Arc;

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, body, web};
use futures_util::stream::empty;
use serde_json::json;

use super::openai::chat_completions::render;
use super::request_headers::Prefer;
use crate::error::ApiError;
use crate::json;
use crate::metrics::Delivery;
use crate::replies::OpenReply;
use crate::state::AppState;
use crate::stream::connection::Connection;
use crate::stream::cursor::Cursor;
use crate::stream::reply_stream::{Form, ReplyStream};
use crate::stream::sse::{self, Session};

/// When to ask for an answer that is not there yet.
const RETRY_LATER_S: u64 = 1;

/// How a client wants a reply.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) form: Form,
    pub(super) prefer: Prefer,
    pub(super) cursor: Option<Cursor>,
}

/// Answers with a reply that is running or has ended.
pub(super) async fn answer(
    reply: OpenReply,
    wanted: Wanted,
    request: &HttpRequest,
    state: &web::Data<AppState>,
) -> Result<HttpResponse, ApiError> {
    match wanted.form {
        Form::Plain => plain(reply, wanted.prefer, state).await,
        Form::Streamed(options) => {
            let OpenReply { stream, mut reader, arrival } = reply;
            let hold = wanted.prefer.wait.unwrap_or(state.options.status_hold);
            // A client that has a part of the stream has had its status.
            if wanted.cursor.is_none()
                && let Ok(opening) = tokio::time::timeout(hold, reader.opening()).await
            {
                opening?;
            }
            let render = render::Chunks::new(stream.head.clone(), options);
            let period = state.options.comment_period;
            let session = Session {
                stream,
                reader,
                after: wanted.cursor,
                connection: request.conn_data::<Arc<Connection>>().cloned(),
                comment_period: options.heartbeat.then_some(period),
                write_timeout: state.options.write_timeout,
                metrics: Arc::clone(&state.metrics),
                permit: state.readers.permit(),
                delivery: arrival.map(|arrival| Delivery::new(Arc::clone(&state.metrics), arrival)),
            };
            let mut response = sse::respond(session, render);
            apply_wait(&mut response, wanted.prefer)?;
            Ok(response)
        }
    }
}

async fn plain(reply: OpenReply, prefer: Prefer, state: &AppState) -> Result<HttpResponse, ApiError> {
    let OpenReply { stream, mut reader, .. } = reply;
    // Short answers and early failures need no second request.
    let wait = prefer.wait.unwrap_or(state.options.status_hold);
    let waited = match prefer.respond_async {
        true => tokio::time::timeout(wait, reader.terminal()).await,
        false => Ok(Ok(())),
    };
    // What cannot be promised is waited for, as if nothing had been preferred.
    let is_late = waited.is_err();
    let is_promised = match waited {
        Ok(ended) => {
            ended?;
            false
        }
        Err(_) => state.streams.promise(&stream),
    };
    let is_async = prefer.respond_async && (!is_late || is_promised);
    let mut response = match is_promised {
        true => {
            // The reader leaves only after the promise that the reply can be fetched.
            drop(reader);
            pending(&stream)
        }
        false => render::plain(reader, &stream.head).await?,
    };
    finish_plain(&mut response, &stream, Prefer { respond_async: is_async, ..prefer })?;
    Ok(response)
}

/// What an answer begins with, as far as that is known without reading the reply.
///
/// # Errors
/// What the reply ended with, where its answer would have that status.
pub(super) fn head(stream: &ReplyStream, wanted: Wanted) -> Result<HttpResponse, ApiError> {
    // A client that has a part of the stream has had its status.
    let is_begun = wanted.cursor.is_some();
    let is_streamed = wanted.form != Form::Plain;
    if let Some(error) = stream.log.failure(is_streamed).filter(|_| !is_begun) {
        return Err(error.into());
    }
    if is_streamed {
        // As long as the stream itself: unknown.
        let mut response = sse::head(&stream.id).streaming(empty::<Result<web::Bytes, Infallible>>());
        apply_wait(&mut response, wanted.prefer)?;
        return Ok(response);
    }
    let mut response = match wanted.prefer.respond_async && !stream.log.has_ended() {
        true => pending(stream),
        // Its length is known to who reads it.
        false => HttpResponse::Ok().content_type("application/json").body(body::None::new()),
    };
    finish_plain(&mut response, stream, wanted.prefer)?;
    Ok(response)
}

fn finish_plain(response: &mut HttpResponse, stream: &ReplyStream, prefer: Prefer) -> Result<(), ApiError> {
    name(response, stream)?;
    if !prefer.respond_async {
        return Ok(());
    }
    let mut preference = "respond-async".to_owned();
    if let Some(wait) = prefer.wait {
        preference += &format!(", wait={}", wait.as_secs());
    }
    applied(response, &preference)
}

/// Tells where to fetch the answer.
fn pending(stream: &ReplyStream) -> HttpResponse {
    let location = format!("/v1/streams/{}", stream.id);
    let mut response = HttpResponse::Accepted();
    response.insert_header((header::LOCATION, location.as_str()));
    response.insert_header((header::RETRY_AFTER, RETRY_LATER_S));
    let pending = json!({"id": stream.head.id, "object": "chat.completion.pending", "location": location});
    json::answer(response, &pending)
}

fn name(response: &mut HttpResponse, stream: &ReplyStream) -> Result<(), ApiError> {
    set(response, "glm-stream-id", &stream.id.to_string())
}

fn apply_wait(response: &mut HttpResponse, prefer: Prefer) -> Result<(), ApiError> {
    prefer.wait.map_or(Ok(()), |wait| applied(response, &format!("wait={}", wait.as_secs())))
}

fn applied(response: &mut HttpResponse, preference: &str) -> Result<(), ApiError> {
    set(response, "preference-applied", preference)
}

fn set(response: &mut HttpResponse, name: &'static str, value: &str) -> Result<(), ApiError> {
    let value =
        header::HeaderValue::from_str(value).map_err(|error| ApiError::internal(error.to_string()))?;
    response.headers_mut().insert(header::HeaderName::from_static(name), value);
    Ok(())
}
