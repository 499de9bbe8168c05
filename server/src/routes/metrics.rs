//! Owns the endpoint that Prometheus scrapes.

use actix_web::{HttpResponse, web};

use crate::error::ApiError;
use crate::lifecycle::Lifecycle;

/// The exposition, while the model is loaded too.
pub(super) async fn scrape(lifecycle: web::Data<Lifecycle>) -> Result<HttpResponse, ApiError> {
    let text = lifecycle.metrics.encode().map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(HttpResponse::Ok().content_type(prometheus::TEXT_FORMAT).body(text))
}
