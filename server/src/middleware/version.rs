//! Owns the version handshake: what this server is, said in every `/v1` answer, and the refusal of a
//! client that wants another model.
//!
//! Invariant: a client that pins a digest gets replies of exactly that model, or 409 with both values.

use actix_web::body::{BoxBody, EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::middleware::Next;
use actix_web::web;

use crate::error::ApiError;
use crate::state::AppState;

/// Grows when what a client may rely on changes.
pub(crate) const API_VERSION: &str = "1";
const VERSION_HEADER: HeaderName = HeaderName::from_static("glm-api-version");
const DIGEST_HEADER: HeaderName = HeaderName::from_static("glm-model-digest");

/// Compares what the client pins, and names what this server is. Who wants another model is answered with 409.
///
/// # Errors
/// Those of the inner service.
pub(crate) async fn greet<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B, BoxBody>>, actix_web::Error> {
    let state = request.app_data::<web::Data<AppState>>().cloned();
    let digest = state.as_ref().map_or("", |state| state.model.manifest.digest.as_str());
    let other = request.headers().get(DIGEST_HEADER).filter(|pinned| pinned.as_bytes() != digest.as_bytes());
    let mut response = match other.map(|other| String::from_utf8_lossy(other.as_bytes()).into_owned()) {
        Some(other) => {
            request.error_response(ApiError::model_digest_mismatch(&other, digest)).map_into_right_body()
        }
        None => next.call(request).await?.map_into_left_body(),
    };
    let headers = response.headers_mut();
    headers.insert(VERSION_HEADER, HeaderValue::from_static(API_VERSION));
    if let Ok(digest) = HeaderValue::from_str(digest) {
        headers.insert(DIGEST_HEADER, digest);
    }
    Ok(response)
}
