//! Owns liveness and readiness: whether to restart this server, and whether to send it requests.

use actix_web::{HttpResponse, web};
use serde_json::json;

use crate::state::{AppState, Readiness};

/// 200 while the engine's thread is there.
pub(super) async fn live(state: web::Data<AppState>) -> HttpResponse {
    match state.engine.status().alive {
        true => HttpResponse::Ok().json(json!({"status": "alive"})),
        false => HttpResponse::ServiceUnavailable().json(json!({"status": "the engine thread has ended"})),
    }
}

/// 200 while requests are welcome.
pub(super) async fn ready(state: web::Data<AppState>) -> HttpResponse {
    let status = match state.readiness() {
        Readiness::Ready => return HttpResponse::Ok().json(json!({"status": "ready"})),
        Readiness::WarmingUp => "warming up",
        Readiness::Draining => "draining",
        Readiness::EngineDown => "the engine takes no requests",
    };
    HttpResponse::ServiceUnavailable().json(json!({"status": status}))
}
