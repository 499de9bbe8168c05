//! Owns the request headers that steer a reply: `Idempotency-Key`, `Last-Event-ID`, `Prefer`,
//! `GLM-Timeout`.
//!
//! Invariant: a header that is there is honoured or refused by name; only `Prefer` may be ignored, as
//! its standard (RFC 7240) wants.

use std::time::Duration;

use actix_web::HttpRequest;
use actix_web::http::header::HeaderMap;

use crate::error::ApiError;
use crate::stream::cursor::EventId;
use crate::stream::time_limits::TimeLimits;

/// Longer than any UUID with a prefix, and short enough to keep thousands.
pub(super) const MAX_KEY_BYTES: usize = 255;
/// Proxies commonly cut what is silent for 60 s.
pub(super) const MAX_WAIT: Duration = Duration::from_secs(60);

pub(super) const KEY: &str = "idempotency-key";
const LAST: &str = "last-event-id";
const TIMEOUT: &str = "glm-timeout";

/// What `Prefer` asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Prefer {
    /// How long to wait for the first token or, if `respond_async`, for the whole answer.
    pub(super) wait: Option<Duration>,
    /// Rather be told where to fetch the answer than wait for it.
    pub(super) respond_async: bool,
}

/// The headers of one request.
#[derive(Debug)]
pub(super) struct RequestHeaders {
    pub(super) key: Option<String>,
    pub(super) last: Option<EventId>,
    pub(super) prefer: Prefer,
    /// The server's limits, shortened by the request's.
    pub(super) limits: TimeLimits,
    /// The request's own limits alone.
    pub(super) patience: TimeLimits,
}

impl RequestHeaders {
    /// Reads them; `limits` are the server's own.
    pub(super) fn read(request: &HttpRequest, limits: TimeLimits) -> Result<Self, ApiError> {
        let headers = request.headers();
        let key = text(headers, KEY)?.map(|key| match key.len() {
            1..=MAX_KEY_BYTES => Ok(key.to_owned()),
            _ => Err(ApiError::invalid_header(KEY, &format!("it must have 1 to {MAX_KEY_BYTES} bytes"))),
        });
        let last = text(headers, LAST)?.map(|last| {
            last.parse().map_err(|()| ApiError::invalid_header(LAST, "it must be an `id:` of this stream"))
        });
        let patience = text(headers, TIMEOUT)?.map(TimeLimits::parse).transpose();
        let patience =
            patience.map_err(|error| ApiError::invalid_header(TIMEOUT, &error))?.unwrap_or_default();
        Ok(Self {
            key: key.transpose()?,
            last: last.transpose()?,
            prefer: prefer(headers),
            limits: limits.shortened_by(&patience),
            patience,
        })
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, ApiError> {
    let mut values = headers.get_all(name);
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(ApiError::invalid_header(name, "it is given twice"));
    }
    value.to_str().map(Some).map_err(|_| ApiError::invalid_header(name, "it must be visible ASCII"))
}

fn prefer(headers: &HeaderMap) -> Prefer {
    let mut prefer = Prefer::default();
    let values = headers.get_all("prefer").filter_map(|value| value.to_str().ok());
    for preference in values.flat_map(|value| value.split(',')) {
        match preference.trim().split_once('=') {
            None if preference.trim().eq_ignore_ascii_case("respond-async") => prefer.respond_async = true,
            Some((name, seconds)) if name.trim().eq_ignore_ascii_case("wait") => {
                let wait = seconds.trim().parse().map(Duration::from_secs);
                prefer.wait = wait.ok().map(|wait| wait.min(MAX_WAIT)).or(prefer.wait);
            }
            _ => {}
        }
    }
    prefer
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    fn read(headers: &[(&str, &str)]) -> Result<RequestHeaders, String> {
        let request =
            headers.iter().fold(TestRequest::default(), |request, header| request.append_header(*header));
        let headers = RequestHeaders::read(&request.to_http_request(), TimeLimits::default());
        headers.map_err(|error| error.body()["error"]["param"].to_string())
    }

    #[test]
    fn preferences_are_read_and_strange_ones_ignored() {
        let prefer = |value| read(&[("prefer", value)]).unwrap().prefer;
        let second = Duration::from_secs(1);
        assert_eq!(prefer("respond-async, wait=7"), Prefer { wait: Some(7 * second), respond_async: true });
        assert_eq!(prefer("Wait=9999"), Prefer { wait: Some(MAX_WAIT), respond_async: false });
        assert_eq!(prefer("wait=-1, handling=strict, respond-async-ish"), Prefer::default());
    }

    #[test]
    fn wrong_headers_are_named() {
        for (name, value) in [
            ("idempotency-key", ""),
            ("idempotency-key", "x".repeat(256).as_str()),
            ("idempotency-key", "schlüssel"),
            ("last-event-id", "7"),
            ("last-event-id", "1.0"),
            ("last-event-id", "00ab0102.1.0x"),
            ("glm-timeout", "soon"),
        ] {
            assert_eq!(read(&[(name, value)]).unwrap_err(), format!("{name:?}"), "{value}");
        }
        let twice = [("idempotency-key", "a"), ("idempotency-key", "b")];
        assert_eq!(read(&twice).unwrap_err(), "\"idempotency-key\"");
    }
}
