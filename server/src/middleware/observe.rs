//! Owns the count of requests that are answered with an error.

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::middleware::Next;
use actix_web::web;

use crate::error::ApiError;
use crate::lifecycle::Lifecycle;

/// Counts the requests that are answered with an error.
///
/// # Errors
/// Those of the inner service.
pub(crate) async fn count<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<B>, actix_web::Error> {
    let lifecycle = request.app_data::<web::Data<Lifecycle>>().cloned();
    let count = |error: Option<&actix_web::Error>| {
        if let (Some(lifecycle), Some(error)) = (&lifecycle, error.and_then(|e| e.as_error::<ApiError>())) {
            lifecycle.metrics.refused(error.code());
        }
    };
    match next.call(request).await {
        Ok(response) => {
            count(response.response().error());
            Ok(response)
        }
        Err(error) => {
            count(Some(&error));
            Err(error)
        }
    }
}
