//! Owns `/v1/streams`: read a reply again or further by its id, and end it, by its id or by its key.
//!
//! Invariant: to anybody but its owner a reply is not there.

use std::sync::Arc;

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};

use super::answer::{self, Wanted, answer};
use super::request_headers::{KEY, RequestHeaders};
use crate::error::ApiError;
use crate::principal::{Owner, Principal};
use crate::replies::{self, place};
use crate::state::AppState;
use crate::stream::event::AbortReason;
use crate::stream::names::StreamId;
use crate::stream::reply_stream::{Form, ReplyStream, StreamOptions};

/// Goes on after `Last-Event-ID`, or starts from the start.
pub(super) async fn get(
    request: HttpRequest,
    id: web::Path<String>,
    principal: web::ReqData<Principal>,
    state: web::Data<AppState>,
) -> Result<HttpResponse, ApiError> {
    let (headers, stream, wanted) = asked(&request, &id, principal.owner, &state)?;
    let reply = replies::join(&state, stream, headers.last, headers.patience)?;
    answer(reply, wanted, &request, &state).await
}

/// What `get` would begin with. It is no reader: nobody waits for it, and no reply goes on for it.
pub(super) async fn head(
    request: HttpRequest,
    id: web::Path<String>,
    principal: web::ReqData<Principal>,
    state: web::Data<AppState>,
) -> Result<HttpResponse, ApiError> {
    let (_, stream, wanted) = asked(&request, &id, principal.owner, &state)?;
    answer::head(&stream, wanted)
}

/// The reply that is asked for, and how.
fn asked(
    request: &HttpRequest,
    id: &str,
    owner: Owner,
    state: &AppState,
) -> Result<(RequestHeaders, Arc<ReplyStream>, Wanted), ApiError> {
    let headers = RequestHeaders::read(request, state.options.time_limits)?;
    let stream = find(id, owner, state)?;
    if !stream.is_resumable() {
        return Err(ApiError::stream_not_resumable());
    }
    let form = form(request, &stream, headers.last.is_some())?;
    let wanted = Wanted { form, prefer: headers.prefer, cursor: place(&stream, headers.last)? };
    Ok((headers, stream, wanted))
}

/// Ends the reply that the key names, for a client that has no answer yet which would name the stream.
pub(super) async fn delete_by_key(
    request: HttpRequest,
    principal: web::ReqData<Principal>,
    state: web::Data<AppState>,
) -> Result<HttpResponse, ApiError> {
    let key = RequestHeaders::read(&request, state.options.time_limits)?.key;
    let key =
        key.ok_or_else(|| ApiError::invalid_header(KEY, "it is needed here: it says which reply to end"))?;
    let stream = state.streams.find_key(principal.owner, &key).ok_or_else(ApiError::stream_not_found)?;
    stream.abort(AbortReason::Deleted);
    Ok(HttpResponse::NoContent().finish())
}

/// Ends the reply; an ended one stays ended.
pub(super) async fn delete(
    id: web::Path<String>,
    principal: web::ReqData<Principal>,
    state: web::Data<AppState>,
) -> Result<HttpResponse, ApiError> {
    find(&id, principal.owner, &state)?.abort(AbortReason::Deleted);
    Ok(HttpResponse::NoContent().finish())
}

fn find(id: &str, owner: Owner, state: &AppState) -> Result<Arc<ReplyStream>, ApiError> {
    state.streams.find(owner, &StreamId::given(id)).ok_or_else(ApiError::stream_not_found)
}

/// The form that `Accept` names, or else that of the request which made the reply.
fn form(request: &HttpRequest, stream: &ReplyStream, has_cursor: bool) -> Result<Form, ApiError> {
    let accept = request.headers().get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let accept = accept.unwrap_or_default();
    let streamed = match stream.form {
        Form::Streamed(_) => stream.form,
        Form::Plain => Form::Streamed(StreamOptions::default()),
    };
    let form = if accept.contains("text/event-stream") {
        streamed
    } else if accept.contains("application/json") {
        Form::Plain
    } else if has_cursor {
        streamed
    } else {
        stream.form
    };
    match form {
        Form::Plain if has_cursor => {
            Err(ApiError::invalid_header("last-event-id", "a JSON answer has no events"))
        }
        form => Ok(form),
    }
}
