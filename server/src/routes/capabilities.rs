//! Owns `GET /v1/capabilities`: what a client can rely on here.

use actix_web::{HttpResponse, web};
use serde_json::json;

use super::openai::chat_completions;
use super::request_headers::{MAX_KEY_BYTES, MAX_WAIT};
use crate::json;
use crate::middleware::version::API_VERSION;
use crate::state::AppState;
use crate::stream::time_limits::Limit;

/// What a client can rely on here.
pub(super) async fn get(state: web::Data<AppState>) -> HttpResponse {
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
