//! Owns the version handshake: what this server is, said in every `/v1` answer, and the refusal of a
//! client that wants another model.
//!
//! Invariant: a client that pins a digest gets replies of exactly that model, or 409 with both values.

use actix_web::body::{BoxBody, EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{HttpResponse, web};
use serde_json::json;

use super::chat_completions;
use super::request_headers::{MAX_KEY_BYTES, MAX_WAIT};
use crate::error::ApiError;
use crate::json;
use crate::state::AppState;
use crate::stream::time_limits::Limit;

/// Grows when what a client may rely on changes.
const API_VERSION: &str = "1";
const VERSION_HEADER: HeaderName = HeaderName::from_static("glm-api-version");
const DIGEST_HEADER: HeaderName = HeaderName::from_static("glm-model-digest");

/// Compares what the client pins, and names what this server is. Who wants another model is answered with 409.
///
/// # Errors
/// Those of the inner service.
pub(super) async fn greet<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B, BoxBody>>, actix_web::Error> {
    let state = request.app_data::<web::Data<AppState>>().cloned();
    let digest = state.as_ref().map_or("", |state| state.model.manifest.digest.as_str());
    let other = request.headers().get(DIGEST_HEADER).filter(|pinned| pinned.as_bytes() != digest.as_bytes());
    let mut response = match other.map(|other| String::from_utf8_lossy(other.as_bytes()).into_owned()) {
        Some(other) => {
            request.error_response(ApiError::model_digest_mismatch(&other, digest)).map_into_right_body()
        }
        None => next.call(request).await?.map_into_left_body(),
    };
    let headers = response.headers_mut();
    headers.insert(VERSION_HEADER, HeaderValue::from_static(API_VERSION));
    if let Ok(digest) = HeaderValue::from_str(digest) {
        headers.insert(DIGEST_HEADER, digest);
    }
    Ok(response)
}

/// What a client can rely on here.
pub(super) async fn capabilities(state: web::Data<AppState>) -> HttpResponse {
    let (options, limits) = (&state.options, state.engine.limits());
    let seconds = |limit| options.time_limits.get(limit).map(|limit| limit.as_secs_f64());
    let capabilities = json!({
        "object": "capabilities",
        "api_version": API_VERSION,
        "server": {"name": "glmserve", "version": env!("CARGO_PKG_VERSION")},
        "models": state.model.names,
        "model_digest": state.model.manifest.digest,
        "limits": {
            "max_model_len": limits.max_model_len,
            "max_num_requests": limits.max_num_requests,
            "max_body_bytes": options.max_body_bytes,
            "max_reply_bytes": options.log_limits.max_bytes,
        },
        "timeouts_s": {
            "queue": seconds(Limit::Queue),
            "first-token": seconds(Limit::FirstToken),
            "inter-token": seconds(Limit::InterToken),
            "total": seconds(Limit::Total),
        },
        "chat_completions": chat_completions::capabilities(),
        "resume": {
            "grace_s": options.resume_grace.as_secs_f64(),
            "retention_s": options.store_limits.retention.as_secs_f64(),
            "max_detached_per_key": options.store_limits.max_detached,
            "max_key_bytes": MAX_KEY_BYTES,
        },
        "heartbeat_s": options.comment_period.as_secs_f64(),
        "status_hold_ms": u64::try_from(options.status_hold.as_millis()).unwrap_or(u64::MAX),
        "max_wait_s": MAX_WAIT.as_secs(),
    });
    json::answer(HttpResponse::Ok(), &capabilities)
}
