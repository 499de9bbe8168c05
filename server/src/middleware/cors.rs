//! Owns what pages in browsers may ask: preflights are answered, foreign origins are refused.
//!
//! Invariants: a preflight is answered before anybody asks for a key, which browsers do not send with
//! it; a request of an origin that is not allowed is refused before its body is read, on every path:
//! probes and Prometheus send no `Origin`. No answer allows credentials: cookies mean nothing here.
//!
//! Written here and not taken from a crate such as actix-cors: the rule weighs `Origin` against `Host`
//! and the API keys and refuses with a typed error, and beside that only the writing of headers is left.

use actix_web::body::{BoxBody, EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use actix_web::http::{Method, StatusCode};
use actix_web::middleware::Next;
use actix_web::{HttpResponse, web};

use crate::error::ApiError;
use crate::lifecycle::Lifecycle;
use crate::origin::Origin;

/// The methods that any route takes.
const METHODS: HeaderValue = HeaderValue::from_static("GET, HEAD, POST, DELETE, OPTIONS");
/// What a page can read besides the headers that every page can.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "x-request-id, retry-after, glm-stream-id, glm-api-version, glm-model-digest, location, \
     preference-applied, x-should-retry",
);
/// An hour: a page does not ask before each message, and a changed list is soon seen.
const MAX_AGE: HeaderValue = HeaderValue::from_static("3600");
/// The headers of SDKs take some 300 bytes.
const MAX_HEADERS_BYTES: usize = 4096;

const TRUE: HeaderValue = HeaderValue::from_static("true");
const REQUEST_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-request-private-network");
const ALLOW_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-allow-private-network");
/// What an answer to a preflight depends on besides the origin.
const PREFLIGHT_VARY: HeaderValue = HeaderValue::from_static(
    "access-control-request-method, access-control-request-headers, access-control-request-private-network",
);

/// Answers preflights, refuses foreign origins, and tells browsers which page may read an answer.
///
/// # Errors
/// Those of the inner service.
pub(crate) async fn guard<B: MessageBody>(
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B, BoxBody>>, actix_web::Error> {
    let origin = match allowed_origin(&request) {
        Ok(origin) => origin,
        Err(error) => {
            let mut response = request.error_response(error);
            response.headers_mut().append(header::VARY, HeaderValue::from_static("origin"));
            return Ok(response.map_into_right_body());
        }
    };
    let is_preflight = origin.is_some()
        && request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if is_preflight {
        match preflight(request.headers()) {
            Ok(response) => request.into_response(response).map_into_right_body(),
            Err(error) => request.error_response(error).map_into_right_body(),
        }
    } else {
        next.call(request).await?.map_into_left_body()
    };
    let headers = response.headers_mut();
    // Also where no page asked: a cache must not give a page the answer that was made for none.
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    }
    Ok(response)
}

/// The origin of the page that asks, as it was sent; `None` if no page does.
fn allowed_origin(request: &ServiceRequest) -> Result<Option<HeaderValue>, ApiError> {
    let mut values = request.headers().get_all(header::ORIGIN);
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(ApiError::origin_not_allowed("the header origin is given more than once"));
    }
    let text = String::from_utf8_lossy(value.as_bytes());
    let origin: Origin = text
        .parse()
        .map_err(|error| ApiError::origin_not_allowed(format!("the header origin: {text:?} {error}")))?;
    let Some(lifecycle) = request.app_data::<web::Data<Lifecycle>>() else {
        return Err(ApiError::internal("the server has no options"));
    };
    // Not from `connection_info`: it believes X-Forwarded-Host, which a page may set.
    let mut hosts = request.headers().get_all(header::HOST);
    let host = hosts.next().filter(|_| hosts.next().is_none()).and_then(|host| host.to_str().ok());
    match lifecycle.options.allowed_origins.permits(&origin, host, lifecycle.keys.is_some()) {
        true => Ok(Some(value.clone())),
        false => Err(ApiError::origin_not_allowed(format!(
            "pages of the origin {text} may not use this server; its operator can allow them with \
             --allowed-origins or GLMSERVE_ALLOWED_ORIGINS"
        ))),
    }
}

/// All methods and all headers: whether a request is right is said by its own answer.
fn preflight(request: &HeaderMap) -> Result<HttpResponse, ApiError> {
    let mut response = HttpResponse::new(StatusCode::NO_CONTENT);
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    headers.insert(header::VARY, PREFLIGHT_VARY);
    if let Some(names) = asked_headers(request)? {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names);
    }
    if request.get(REQUEST_PRIVATE_NETWORK) == Some(&TRUE) {
        headers.insert(ALLOW_PRIVATE_NETWORK, TRUE);
    }
    Ok(response)
}

/// The names of headers that a page wants to send. They are repeated: `*` would not cover `authorization`.
fn asked_headers(request: &HeaderMap) -> Result<Option<HeaderValue>, ApiError> {
    let name = header::ACCESS_CONTROL_REQUEST_HEADERS;
    let values: Vec<&[u8]> = request.get_all(&name).map(HeaderValue::as_bytes).collect();
    let names = values.join(&b", "[..]);
    let is_list = names.iter().all(|byte| matches!(byte, b',' | b' ' | b'\t') || is_token(*byte));
    if names.len() > MAX_HEADERS_BYTES || !is_list {
        let message = format!("it must be a list of header names of at most {MAX_HEADERS_BYTES} bytes");
        return Err(ApiError::invalid_header(name.as_str(), &message));
    }
    let names = HeaderValue::from_bytes(&names).map_err(|error| ApiError::internal(error.to_string()))?;
    Ok((!values.is_empty()).then_some(names))
}

/// What a header's name may consist of.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
