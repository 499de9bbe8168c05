//! Owns `POST /v1/chat/completions`: read, convert, start or find, answer.
//!
//! Invariant: streamed and plain answers are two readers of the same log, so they cannot differ.

mod capabilities;
mod convert;
pub(in crate::routes) mod render;
mod request;
mod types;

use std::sync::Arc;

use actix_web::{HttpRequest, HttpResponse, web};

pub(in crate::routes) use self::capabilities::capabilities;
use self::convert::Completion;
use self::request::ChatCompletionRequest;
use crate::error::ApiError;
use crate::metrics::Arrival;
use crate::principal::{Client, Principal};
use crate::replies::{self, NewReply};
use crate::routes::answer::{Wanted, answer};
use crate::routes::body::Body;
use crate::routes::request_headers::RequestHeaders;
use crate::state::AppState;
use crate::stream::names::RequestKey;
use crate::stream::reply_stream::Form;

/// Up to here a body is parsed and tokenised on the HTTP worker: less than handing it over costs.
const INLINE_BODY_BYTES: usize = 8 * 1024;

/// Answers one request.
pub(in crate::routes) async fn create(
    request: HttpRequest,
    body: web::Payload,
    principal: web::ReqData<Principal>,
    state: web::Data<AppState>,
) -> Result<HttpResponse, ApiError> {
    let RequestHeaders { key, last, prefer, limits, patience } =
        RequestHeaders::read(&request, state.options.time_limits)?;
    let client = Client::of(principal.owner, request.peer_addr());
    let body = Body::read(&request, body, client, &state).await?;
    // From here on: how long a client takes to send its body says nothing about this server.
    let arrival = Arrival::now();
    if key.is_none() {
        // Before the work of reading and tokenising. A known key may need no permit.
        replies::check_room(&state)?;
    }
    let (completion, key) = if body.len() <= INLINE_BODY_BYTES {
        convert(body, key, &state)?
    } else {
        let state = state.clone();
        // If the client leaves, this handler is dropped; what waits for its turn is then left undone.
        let client_is_here = Arc::new(());
        let is_wanted = Arc::downgrade(&client_is_here);
        web::block(move || match is_wanted.strong_count() {
            0 => Err(ApiError::internal("the client left before its request was read")),
            _ => convert(body, key, &state),
        })
        .await
        .map_err(|error| ApiError::internal(error.to_string()))??
    };
    let Completion { request: mut engine_request, stop, head, form } = completion;
    engine_request.tenant = principal.tenant;
    let reply = match last {
        None => {
            let new = NewReply {
                request: engine_request,
                stop,
                head,
                form,
                key,
                owner: principal.owner,
                client,
                limits,
                patience,
            };
            replies::start(&state, new, arrival)?
        }
        Some(_) => {
            let error = |what| Err(ApiError::invalid_header("last-event-id", what));
            let Some(key) = key else { return error("it needs the Idempotency-Key of the stream") };
            if form == Form::Plain {
                return error("it needs `stream: true`");
            }
            replies::resume(&state, principal.owner, &key, last, patience)?
        }
    };
    let cursor = last.map(|last| last.cursor);
    answer(reply, Wanted { form, prefer, cursor }, &request, &state).await
}

/// Reads the body of a chat completion request as [`create`] does, and returns the hash of what it asks for: the
/// entry for fuzzers and for tests of the memory that a body takes.
///
/// # Errors
/// 400: the body is no JSON, or a field is unknown, refused or has a value that it can't have.
pub fn request_fingerprint(body: &[u8]) -> Result<[u8; 32], ApiError> {
    ChatCompletionRequest::parse(body).map(|request| request.fingerprint())
}

/// Takes the body, whose memory is free for others from the end of this on: before anything is generated.
fn convert(
    body: Body,
    key: Option<String>,
    state: &AppState,
) -> Result<(Completion, Option<RequestKey>), ApiError> {
    let request = ChatCompletionRequest::parse(&body)?;
    let key = key.map(|key| RequestKey { key, fingerprint: request.fingerprint() });
    Ok((Completion::new(request, state)?, key))
}
