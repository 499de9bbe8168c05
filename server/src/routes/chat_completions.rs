//! Owns `POST /v1/chat/completions`: read, convert, start or find, answer.
//!
//! Invariant: streamed and plain answers are two readers of the same log, so they cannot differ.

mod convert;
mod fields;
mod fingerprint;
pub(super) mod render;
mod request;
mod types;

use std::time::Duration;

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use glm_engine::TenantId;
use tokio::sync::SemaphorePermit;

use self::convert::Completion;
pub(super) use self::fields::HONOURED as SUPPORTED_FIELDS;
use super::answer::{Wanted, answer};
use super::request_headers::RequestHeaders;
use crate::error::ApiError;
use crate::metrics::Arrival;
use crate::state::{AppState, NewReply};
use crate::stream::reply_stream::Form;
use crate::stream::store::{Owner, RequestKey};

/// A body that trickles in slower than this keeps a connection for nothing.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// Up to here a body is parsed and tokenised on the HTTP worker: less than handing it over costs.
const INLINE_BODY_BYTES: usize = 8 * 1024;

/// Answers one request.
pub(super) async fn create(
    request: HttpRequest,
    body: web::Payload,
    owner: web::ReqData<Owner>,
    tenant: web::ReqData<TenantId>,
    state: web::Data<AppState>,
) -> Result<HttpResponse, ApiError> {
    let RequestHeaders { key, cursor, prefer, limits } =
        RequestHeaders::read(&request, state.options.time_limits)?;
    let (body, _memory) = read(&request, body, &state).await?;
    // From here on: how long a client takes to send its body says nothing about this server.
    let arrival = Arrival::now();
    if key.is_none() {
        // Before the work of reading and tokenising. A known key may need no place.
        state.check_room()?;
    }
    let (completion, key) = if body.len() <= INLINE_BODY_BYTES {
        convert(&body, key, &state)?
    } else {
        let state = state.clone();
        web::block(move || convert(&body, key, &state))
            .await
            .map_err(|error| ApiError::internal(error.to_string()))??
    };
    let Completion { request: mut engine_request, stop, head, form } = completion;
    engine_request.tenant = *tenant;
    let reply = match cursor {
        None => {
            let new = NewReply { request: engine_request, stop, head, form, key, owner: *owner, limits };
            state.start_reply(new, arrival)?
        }
        Some(_) => {
            let error = |what| Err(ApiError::invalid_header("last-event-id", what));
            let Some(key) = key else { return error("it needs the Idempotency-Key of the stream") };
            if form == Form::Plain {
                return error("it needs `stream: true`");
            }
            state.resume(*owner, &key, cursor)?
        }
    };
    answer(reply, Wanted { form, prefer, cursor }, &request, &state).await
}

fn convert(
    body: &[u8],
    key: Option<String>,
    state: &AppState,
) -> Result<(Completion, Option<RequestKey>), ApiError> {
    let body = fields::read(body)?;
    let key = key.map(|key| RequestKey { key, fingerprint: fingerprint::fingerprint(body.clone()) });
    Ok((Completion::from_json(body, state)?, key))
}

/// Reads the body, with the permit to hold it in memory.
async fn read<'a>(
    request: &HttpRequest,
    body: web::Payload,
    state: &'a AppState,
) -> Result<(web::Bytes, SemaphorePermit<'a>), ApiError> {
    let headers = request.headers();
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING).filter(|value| *value != "identity") {
        return Err(ApiError::unsupported_encoding(&String::from_utf8_lossy(encoding.as_bytes())));
    }
    let limit = state.options.max_body_bytes;
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    // A body that doesn't say how long it is may be as long as any.
    let num_bytes = length.unwrap_or(limit);
    if num_bytes > limit {
        return Err(ApiError::body_too_large(limit));
    }
    let permit = state.body_memory.permit(num_bytes).ok_or_else(ApiError::too_many_bodies)?;
    let bytes = read_all(body, limit).await?;
    Ok((bytes, permit))
}

async fn read_all(body: web::Payload, limit: usize) -> Result<web::Bytes, ApiError> {
    match tokio::time::timeout(BODY_TIMEOUT, body.to_bytes_limited(limit)).await {
        Ok(Ok(Ok(bytes))) => Ok(bytes),
        Ok(Ok(Err(error))) => Err(ApiError::invalid_body(&error)),
        Ok(Err(_)) => Err(ApiError::body_too_large(limit)),
        Err(_) => Err(ApiError::body_timeout(BODY_TIMEOUT.as_secs())),
    }
}
