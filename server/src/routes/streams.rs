//! Owns `/v1/streams/{id}`: read a reply again or further, and end it.
//!
//! Invariant: to anybody but its owner a reply is not there.

use std::sync::Arc;

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};

use super::answer::{Wanted, answer};
use super::request_headers::RequestHeaders;
use crate::error::ApiError;
use crate::state::AppState;
use crate::stream::event::AbortReason;
use crate::stream::reply_stream::{Form, ReplyStream, StreamOptions};
use crate::stream::store::{Owner, StreamId};

/// Goes on after `Last-Event-ID`, or starts from the start.
pub(super) async fn get(
    request: HttpRequest,
    id: web::Path<String>,
    owner: web::ReqData<Owner>,
    state: web::Data<AppState>,
) -> Result<HttpResponse, ApiError> {
    let headers = RequestHeaders::read(&request, state.options.time_limits)?;
    let stream = find(&id, *owner, &state)?;
    if !stream.is_resumable() {
        return Err(ApiError::stream_not_resumable());
    }
    let form = form(&request, &stream, headers.cursor.is_some())?;
    let reply = state.attach(stream, headers.cursor)?;
    answer(reply, Wanted { form, prefer: headers.prefer, cursor: headers.cursor }, &request, &state).await
}

/// Ends the reply; an ended one stays ended.
pub(super) async fn delete(
    id: web::Path<String>,
    owner: web::ReqData<Owner>,
    state: web::Data<AppState>,
) -> Result<HttpResponse, ApiError> {
    find(&id, *owner, &state)?.abort(AbortReason::Deleted);
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
