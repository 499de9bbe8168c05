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

use std::sync::Arc;

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::json;

use super::chat_completions::render;
use super::request_headers::Prefer;
use crate::error::ApiError;
use crate::json;
use crate::metrics::Delivery;
use crate::state::{AppState, OpenReply};
use crate::stream::connection::Connection;
use crate::stream::cursor::Cursor;
use crate::stream::event_log::LogReader;
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
            if let Some(wait) = wanted.prefer.wait {
                applied(&mut response, &format!("wait={}", wait.as_secs()))?;
            }
            Ok(response)
        }
    }
}

async fn plain(reply: OpenReply, prefer: Prefer, state: &AppState) -> Result<HttpResponse, ApiError> {
    let OpenReply { stream, mut reader, .. } = reply;
    // Short answers and early failures need no second request.
    let wait = prefer.wait.unwrap_or(state.options.status_hold);
    let is_late = prefer.respond_async && tokio::time::timeout(wait, reader.terminal()).await.is_err();
    let is_promised = is_late && state.streams.promise(&stream);
    let mut response = match is_promised {
        true => accepted(&stream, reader),
        false => render::plain(reader, &stream.head).await?,
    };
    name(&mut response, &stream)?;
    // What cannot be promised is waited for, as if nothing had been preferred.
    if prefer.respond_async && is_late == is_promised {
        let mut preference = "respond-async".to_owned();
        if let Some(wait) = prefer.wait {
            preference += &format!(", wait={}", wait.as_secs());
        }
        applied(&mut response, &preference)?;
    }
    Ok(response)
}

/// Tells where to fetch the answer. The reader leaves only after the promise that it can be.
fn accepted(stream: &ReplyStream, reader: LogReader) -> HttpResponse {
    drop(reader);
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

fn applied(response: &mut HttpResponse, preference: &str) -> Result<(), ApiError> {
    set(response, "preference-applied", preference)
}

fn set(response: &mut HttpResponse, name: &'static str, value: &str) -> Result<(), ApiError> {
    let value =
        header::HeaderValue::from_str(value).map_err(|error| ApiError::internal(error.to_string()))?;
    response.headers_mut().insert(header::HeaderName::from_static(name), value);
    Ok(())
}
