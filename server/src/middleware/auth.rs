//! Owns the guard in front of `/v1`.
//!
//! Invariant: behind it a request has a principal, which is that of its key where keys are asked for.

use actix_web::body::{BoxBody, EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::{Method, header};
use actix_web::middleware::Next;
use actix_web::{HttpMessage, web};

use crate::error::ApiError;
use crate::lifecycle::Lifecycle;
use crate::principal::Principal;

/// Lets a request pass that brings a key, if keys are asked for, and notes whose it is.
///
/// Others are answered with 401.
///
/// # Errors
/// Those of the inner service.
pub(crate) async fn guard<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B, BoxBody>>, actix_web::Error> {
    let keys = request.app_data::<web::Data<Lifecycle>>().and_then(|lifecycle| lifecycle.keys.as_ref());
    let mut principal = Principal::ANYBODY;
    if let Some(keys) = keys {
        let header = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = header.and_then(|value| {
            let (scheme, key) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
        });
        principal = match given.and_then(|key| keys.find(key)) {
            Some(found) => found,
            // It says which methods a path takes, and does nothing.
            None if request.method() == Method::OPTIONS => principal,
            None => return Ok(request.error_response(ApiError::invalid_api_key()).map_into_right_body()),
        };
    }
    tracing::Span::current().record("principal", tracing::field::display(principal));
    request.extensions_mut().insert(principal);
    Ok(next.call(request).await?.map_into_left_body())
}
