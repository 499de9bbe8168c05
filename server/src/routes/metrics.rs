//! Owns the endpoint that Prometheus scrapes.

use actix_web::{HttpResponse, web};

use crate::error::ApiError;
use crate::state::AppState;

/// The exposition.
pub(super) async fn scrape(state: web::Data<AppState>) -> Result<HttpResponse, ApiError> {
    let text = state.metrics.encode().map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(HttpResponse::Ok().content_type(prometheus::TEXT_FORMAT).body(text))
}
