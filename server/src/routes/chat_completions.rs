//! Owns `POST /v1/chat/completions`: read, convert, start, answer.
//!
//! Invariant: streamed and plain answers are two readers of the same log, so they cannot differ.

mod convert;
mod fields;
mod render;
mod types;

use std::time::Duration;

use actix_web::{HttpResponse, web};

use self::convert::Completion;
use crate::error::ApiError;
use crate::metrics::Arrival;
use crate::state::AppState;
use crate::stream::sse;

/// A body that trickles in slower than this keeps a connection for nothing.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// Up to here a body is parsed and tokenised on the HTTP worker: less than handing it over costs.
const INLINE_BODY_BYTES: usize = 8 * 1024;

/// Answers one request.
pub(super) async fn create(body: web::Payload, state: web::Data<AppState>) -> Result<HttpResponse, ApiError> {
    let arrival = Arrival::now();
    let body = read(body, state.options.max_body_bytes).await?;
    let completion = if body.len() <= INLINE_BODY_BYTES {
        Completion::from_json(&body, &state)?
    } else {
        let state = state.clone();
        web::block(move || Completion::from_json(&body, &state))
            .await
            .map_err(|error| ApiError::internal(error.to_string()))??
    };
    let Completion { request, stop, head, stream } = completion;
    let reader = state.start_reply(request, stop, arrival)?;
    match stream {
        Some(options) => {
            let render = render::Chunks::new(head, options);
            Ok(sse::respond(reader, render, state.options.comment_period))
        }
        None => render::plain(reader, head).await,
    }
}

async fn read(body: web::Payload, limit: usize) -> Result<web::Bytes, ApiError> {
    match tokio::time::timeout(BODY_TIMEOUT, body.to_bytes_limited(limit)).await {
        Ok(Ok(Ok(bytes))) => Ok(bytes),
        Ok(Ok(Err(error))) => Err(ApiError::invalid_body(&error)),
        Ok(Err(_)) => Err(ApiError::body_too_large(limit)),
        Err(_) => Err(ApiError::body_timeout(BODY_TIMEOUT.as_secs())),
    }
}
