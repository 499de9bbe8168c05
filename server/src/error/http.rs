//! Owns the errors of what a client sent and is no HTTP request.

use actix_web::http::StatusCode;

use super::{ApiError, TOO_MANY_CONNECTIONS};
use crate::http::Malformed;

/// A connection is free as soon as an answer ends.
const RETRY_CONNECTION_S: u32 = 1;

impl ApiError {
    /// The limit of connections is reached, and all of them are being served.
    pub(crate) fn too_many_connections() -> Self {
        let message = "too many connections are open, from this address or in all; reuse connections, and try again after the \
                       time in Retry-After";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, TOO_MANY_CONNECTIONS, message)
            .retry_after(RETRY_CONNECTION_S)
    }

    /// What was sent is no HTTP request.
    pub(crate) fn malformed_http(malformed: Malformed) -> Self {
        let malformed_http = |what| Self::new(StatusCode::BAD_REQUEST, "malformed_http", what);
        match malformed {
            Malformed::Head(what) => malformed_http(format!(
                "this is not an HTTP request that the server reads: {what}; send HTTP/1.1 without TLS"
            )),
            Malformed::Body => {
                malformed_http("the body is not in chunks, as its header transfer-encoding says".to_owned())
            }
            Malformed::HeadTooLarge(limit) => Self::new(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "head_too_large",
                format!(
                    "the headers are more than 96, or larger than {limit} bytes with the request line; send fewer"
                ),
            ),
            Malformed::HeadTimeout(seconds) => Self::new(
                StatusCode::REQUEST_TIMEOUT,
                "head_timeout",
                format!("the request line and the headers did not arrive within {seconds} seconds"),
            ),
        }
    }
}
