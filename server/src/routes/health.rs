//! Owns start-up, liveness and readiness: whether to wait for this server, to restart it, and to send
//! it requests.
//!
//! Invariant: load changes none of them. A busy server is alive and ready, and refuses by itself.

use actix_web::{HttpResponse, web};
use serde_json::json;

use crate::json;
use crate::state::{AppState, Readiness};

/// 200 once the model is loaded and warmed up.
pub(super) async fn started(state: web::Data<AppState>) -> HttpResponse {
    match state.known_answer() {
        Some(_) => json::answer(HttpResponse::Ok(), &json!({"status": "started"})),
        None => unavailable("warming up"),
    }
}

/// 200 while the engine's thread is there and moves.
pub(super) async fn live(state: web::Data<AppState>) -> HttpResponse {
    let status = state.engine.status();
    match status.stalled_for {
        _ if !status.alive => unavailable("the engine thread has ended"),
        Some(stalled) if stalled > status.stall_limit => unavailable(&format!(
            "the engine has work and made no progress for {:.1} s",
            stalled.as_secs_f64()
        )),
        _ => json::answer(HttpResponse::Ok(), &json!({"status": "alive"})),
    }
}

/// 200 while requests are welcome.
pub(super) async fn ready(state: web::Data<AppState>) -> HttpResponse {
    match state.readiness() {
        Readiness::Ready => json::answer(HttpResponse::Ok(), &json!({"status": "ready"})),
        Readiness::WarmingUp => unavailable("warming up"),
        Readiness::Draining => unavailable("draining"),
        Readiness::EngineDown => unavailable("the engine takes no requests"),
        Readiness::Faulty(fault) => {
            unavailable(&format!("the known answer is awaited after a fault of the engine: {fault:?}"))
        }
    }
}

fn unavailable(status: &str) -> HttpResponse {
    json::answer(HttpResponse::ServiceUnavailable(), &json!({"status": status}))
}
