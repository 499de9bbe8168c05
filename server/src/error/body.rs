//! Owns the errors of a body before it is a request: too large, too slow, or not readable.

use actix_web::http::StatusCode;

use super::{ApiError, TOO_MANY_BODIES};

/// A body is read and converted in less, unless its client is slow.
const RETRY_BODY_S: u32 = 1;

impl ApiError {
    /// The body could not be read.
    pub fn invalid_body(error: &dyn std::fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_body", format!("the body cannot be read: {error}"))
    }

    /// The body is not what its `Content-Encoding` says.
    pub fn invalid_encoding(encoding: &str, error: &dyn std::fmt::Display) -> Self {
        let message = format!("the body is not the {encoding} that its content-encoding names: {error}");
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_body", message);
        Self { param: Some("content-encoding".into()), ..error }
    }

    /// The body is text in another encoding than JSON has.
    pub fn not_utf8() -> Self {
        let message = "the body is UTF-16 or UTF-32; JSON is sent as UTF-8 (RFC 8259)";
        Self::new(StatusCode::BAD_REQUEST, "invalid_json", message)
    }

    /// The body is larger than the limit.
    pub fn body_too_large(limit: usize) -> Self {
        let message = format!(
            "the body is larger than the limit of {limit} bytes (unpacked, if it is compressed); send a shorter one"
        );
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    }

    /// Other bodies take all the memory that there is for them.
    pub fn too_many_bodies() -> Self {
        let message = "other large requests take all the memory for request bodies at the moment; send it \
                       again after the time in retry-after";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, TOO_MANY_BODIES, message).retry_after(RETRY_BODY_S)
    }

    /// The body is packed in a way that is not unpacked here.
    pub fn unsupported_encoding(encoding: &str) -> Self {
        let message = format!(
            "the header content-encoding: {encoding} is not supported; send the body as it is, or packed once, with \
             gzip or zstd"
        );
        let error = Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_encoding", message);
        Self { param: Some("content-encoding".into()), ..error }
    }

    /// The body did not arrive in time.
    pub fn body_timeout(seconds: u64) -> Self {
        let message = format!("the body did not arrive within {seconds} seconds; send it again, and faster");
        Self::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message)
    }

    /// The body came slowly, and others needed the memory that it held.
    pub fn body_too_slow() -> Self {
        let message = "the body arrived so slowly that its memory was given to other requests; send it again, \
                       and faster";
        Self::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message).retry_after(RETRY_BODY_S)
    }
}
