//! Owns the list of models: one model under one or more names.

use actix_web::{HttpResponse, web};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::json;
use crate::state::AppState;

/// All names.
pub(in crate::routes) async fn list(state: web::Data<AppState>) -> HttpResponse {
    let models: Vec<Value> = state.model.names.iter().map(|name| describe(&state, name)).collect();
    json::answer(HttpResponse::Ok(), &json!({"object": "list", "data": models}))
}

/// One name.
pub(in crate::routes) async fn get(
    state: web::Data<AppState>,
    name: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let names = &state.model.names;
    // A slash at the end is the name's if there is such a name, or else the path's.
    match names.iter().find(|known| **known == *name || *known == name.trim_end_matches('/')) {
        Some(name) => Ok(json::answer(HttpResponse::Ok(), &describe(&state, name))),
        None => Err(ApiError::model_not_found(&name, names)),
    }
}

fn describe(state: &AppState, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "glmserve",
        "root": state.model.manifest.model.name,
        "max_model_len": state.engine.limits().max_model_len,
    })
}
