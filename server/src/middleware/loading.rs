//! Owns what requests meet while the model is loaded: only health and metrics are answered.
//!
//! Invariant: a handler that asks for [`AppState`] is called only once that is there.

use std::rc::Rc;

use actix_web::body::{BoxBody, EitherBody, MessageBody};
use actix_web::dev::{Extensions, ServiceRequest, ServiceResponse};
use actix_web::middleware::Next;
use actix_web::web;

use crate::error::ApiError;
use crate::lifecycle::Lifecycle;
use crate::state::AppState;

/// Paths that are answered from the start.
const FROM_THE_START: [&str; 5] = ["/livez", "/startupz", "/readyz", "/health", "/metrics"];

/// Gives a request the server's state, if there is one. It must be the first to see the request.
///
/// # Errors
/// Those of the inner service.
pub(crate) async fn attach_state<B: MessageBody>(
    mut request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<B>, actix_web::Error> {
    let lifecycle = request.app_data::<web::Data<Lifecycle>>();
    if let Some(state) = lifecycle.and_then(|lifecycle| lifecycle.state()).cloned() {
        let mut data = Extensions::new();
        data.insert(state);
        request.add_data_container(Rc::new(data));
    }
    next.call(request).await
}

/// Refuses with 503 what can't be answered before the model is loaded.
///
/// # Errors
/// Those of the inner service.
pub(crate) async fn refuse<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B, BoxBody>>, actix_web::Error> {
    if request.app_data::<web::Data<AppState>>().is_none() && !FROM_THE_START.contains(&request.path()) {
        return Ok(request.error_response(ApiError::loading()).map_into_right_body());
    }
    Ok(next.call(request).await?.map_into_left_body())
}
