//! Owns start-up, liveness and readiness: whether to wait for this server, to restart it, and to send
//! it requests.
//!
//! Invariant: load changes none of them. A busy server is alive and ready, and refuses by itself.

use actix_web::http::header;
use actix_web::{HttpResponse, web};
use serde_json::json;

use crate::error::RETRY_UNAVAILABLE_S;
use crate::json;
use crate::lifecycle::Lifecycle;
use crate::state::Readiness;

/// 200 once the model is loaded and warmed up.
pub(super) async fn started(lifecycle: web::Data<Lifecycle>) -> HttpResponse {
    match lifecycle.state() {
        Some(_) => json::answer(HttpResponse::Ok(), &json!({"status": "started"})),
        None => loading(),
    }
}

/// 200 while the model is loaded, and then while the engine's thread is there and moves.
pub(super) async fn live(lifecycle: web::Data<Lifecycle>) -> HttpResponse {
    let alive = || json::answer(HttpResponse::Ok(), &json!({"status": "alive"}));
    let Some(state) = lifecycle.state() else { return alive() };
    let status = state.engine.status();
    match status.stalled_for {
        _ if !status.alive => unavailable("the engine thread has ended"),
        _ if state.has_engine_failed() => unavailable("the engine has failed for good"),
        Some(stalled) if stalled > status.stall_limit => unavailable(&format!(
            "the engine has work and made no progress for {:.1} s",
            stalled.as_secs_f64()
        )),
        _ => alive(),
    }
}

/// 200 while requests are welcome.
pub(super) async fn ready(lifecycle: web::Data<Lifecycle>) -> HttpResponse {
    let Some(state) = lifecycle.state() else { return loading() };
    match state.readiness() {
        Readiness::Ready => json::answer(HttpResponse::Ok(), &json!({"status": "ready"})),
        Readiness::Draining => unavailable("draining"),
        Readiness::EngineDown => unavailable("the engine takes no requests"),
        Readiness::Faulty(fault) => {
            unavailable(&format!("the known answer is awaited after a fault of the engine: {fault:?}"))
        }
    }
}

fn loading() -> HttpResponse {
    unavailable("loading")
}

fn unavailable(status: &str) -> HttpResponse {
    let mut response = HttpResponse::ServiceUnavailable();
    response.insert_header((header::RETRY_AFTER, RETRY_UNAVAILABLE_S));
    json::answer(response, &json!({"status": status}))
}
