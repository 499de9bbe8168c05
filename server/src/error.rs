//! Owns the one map from what can go wrong to an HTTP status and OpenAI's error body.
//!
//! Invariant: each refusal has a stable code, and a client that may try again is told when.

mod body;
mod http;
mod retry;
mod stream;

use std::time::Duration;

use actix_web::body::BoxBody;
use actix_web::http::{StatusCode, header};
use actix_web::{HttpResponse, ResponseError};
use glm_engine::SubmitError;
use serde_json::{Value, json};

use crate::json;
use crate::text::TextError;

/// Codes of refusals that come from the server's load, start or shutdown, not from the request.
pub const LOAD_CODES: [&str; 12] = [
    QUEUE_FULL,
    QUEUE_TIMEOUT_UNMEETABLE,
    DEADLINE_UNMEETABLE,
    QUEUE_TIMEOUT,
    FIRST_TOKEN_TIMEOUT,
    INTER_TOKEN_TIMEOUT,
    REQUEST_TIMEOUT,
    LOADING,
    DRAINING,
    UNAVAILABLE,
    TOO_MANY_BODIES,
    TOO_MANY_CONNECTIONS,
];
const QUEUE_FULL: &str = "queue_full";
const QUEUE_TIMEOUT_UNMEETABLE: &str = "queue_timeout_unmeetable";
const DEADLINE_UNMEETABLE: &str = "deadline_unmeetable";
const QUEUE_TIMEOUT: &str = "queue_timeout";
const FIRST_TOKEN_TIMEOUT: &str = "first_token_timeout";
const INTER_TOKEN_TIMEOUT: &str = "inter_token_timeout";
const REQUEST_TIMEOUT: &str = "request_timeout";
const LOADING: &str = "loading";
const DRAINING: &str = "draining";
const UNAVAILABLE: &str = "unavailable";
const TOO_MANY_CONNECTIONS: &str = "too_many_connections";
const TOO_MANY_BODIES: &str = "too_many_bodies";
const REPLY_TOO_LARGE: &str = "reply_too_large";
const CONTEXT_LENGTH_EXCEEDED: &str = "context_length_exceeded";

/// Another replica answers at once; this one will not come back sooner.
pub(crate) const RETRY_UNAVAILABLE_S: u32 = 5;
/// Errors repeat what clients sent, which may be megabytes.
const MAX_MESSAGE_CHARS: usize = 1000;
const MAX_PARAM_CHARS: usize = 200;

/// How long a prompt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumTokens {
    /// It was tokenised.
    Exactly(usize),
    /// It was not, as so many bytes can't have fewer tokens.
    AtLeast(usize),
}

/// An error as a client sees it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    param: Option<String>,
    retry_after_s: Option<u32>,
    /// The methods that the path takes.
    allowed: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: shortened(message.into(), MAX_MESSAGE_CHARS),
            param: None,
            retry_after_s: None,
            allowed: None,
        }
    }

    fn parameter(code: &'static str, param: impl Into<String>, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, code, message);
        Self { param: Some(shortened(param.into(), MAX_PARAM_CHARS)), ..error }
    }

    fn retry_after(self, seconds: u32) -> Self {
        Self { retry_after_s: Some(seconds), ..self }
    }

    /// A field has a value that it can't have.
    pub fn invalid_value(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::parameter("invalid_value", param, message)
    }

    /// A field of the API that this server can't honour.
    pub fn unsupported_parameter(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::parameter("unsupported_parameter", param, message)
    }

    /// A field that is not known.
    pub fn unknown_parameter(param: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!(
            "unknown parameter: {param}; leave it out (GET /v1/capabilities lists those that are known)"
        );
        Self::parameter("unknown_parameter", param, message)
    }

    /// The body is not JSON.
    pub fn invalid_json(error: &serde_json::Error) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body is not valid JSON: {error}"))
    }

    /// No such model.
    pub fn model_not_found(model: &str, served: &[String]) -> Self {
        let message = format!("the model {model:?} does not exist; this server has {}", served.join(", "));
        let error = Self::new(StatusCode::NOT_FOUND, "model_not_found", message);
        Self { param: Some("model".into()), ..error }
    }

    /// The prompt alone fills the context. Client libraries recognise this error by its words: litellm by OpenAI's,
    /// LangChain by "prompt is too long".
    pub fn prompt_too_long(limit: usize, num_tokens: NumTokens) -> Self {
        let (at_least, num_tokens) = match num_tokens {
            NumTokens::Exactly(num_tokens) => ("", num_tokens),
            NumTokens::AtLeast(num_tokens) => ("at least ", num_tokens),
        };
        let mut message = format!(
            "This model's maximum context length is {limit} tokens. However, your messages resulted in \
             {at_least}{num_tokens} tokens. The prompt is too long. Please reduce the length of the messages."
        );
        if num_tokens == limit {
            message += " A reply needs at least one token more.";
        }
        Self::parameter(CONTEXT_LENGTH_EXCEEDED, "messages", message)
    }

    /// No such path.
    pub fn unknown_url(path: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "unknown_url",
            format!("there is nothing at {path}; the API is below /v1, as in /v1/chat/completions"),
        )
    }

    /// The path exists, the method does not.
    pub fn method_not_allowed(method: &str, path: &str, allowed: &'static str) -> Self {
        let message = format!("{path} does not take {method}; it takes {allowed}");
        let error = Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message);
        Self { allowed: Some(allowed), ..error }
    }

    /// The key is missing or wrong.
    pub fn invalid_api_key() -> Self {
        let message = "a valid API key is needed, as `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }

    /// The server is not there yet.
    pub fn loading() -> Self {
        let message = "the server is loading its model and takes no requests yet; send it again after the time in retry-after";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, LOADING, message).retry_after(RETRY_UNAVAILABLE_S)
    }

    /// The server is going away.
    pub fn draining() -> Self {
        let message = "the server is draining and takes no new requests";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, DRAINING, message).retry_after(RETRY_UNAVAILABLE_S)
    }

    /// A page that may not use this server asks.
    pub fn origin_not_allowed(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::FORBIDDEN, "origin_not_allowed", message);
        Self { param: Some("origin".into()), ..error }
    }

    /// A request's header has a value that it can't have.
    pub fn invalid_header(name: &str, message: &str) -> Self {
        Self::parameter("invalid_header", name, format!("the header {name}: {message}"))
    }

    /// The key came with another body before.
    pub fn idempotency_key_reused() -> Self {
        let message = "this Idempotency-Key was used with another body; use a new key for a new request";
        let error = Self::new(StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reused", message);
        Self { param: Some("idempotency-key".into()), ..error }
    }

    /// No such stream, or none of this client's.
    pub fn stream_not_found() -> Self {
        let message = "there is no such stream, or none of this Idempotency-Key; ended streams are kept for a limited time";
        Self::new(StatusCode::NOT_FOUND, "stream_not_found", message)
    }

    /// The stream belongs to one connection.
    pub fn stream_not_resumable() -> Self {
        let message = "this stream can't be resumed: its request had no Idempotency-Key";
        Self::new(StatusCode::CONFLICT, "stream_not_resumable", message)
    }

    /// Nothing is left to resume. To generate again would not be to resume.
    pub fn stream_gone() -> Self {
        let message = "no stream of this Idempotency-Key is left; without Last-Event-ID it starts again";
        Self::new(StatusCode::GONE, "stream_gone", message)
    }

    /// The stream has no such event.
    pub fn cursor_out_of_range(cursor: &str) -> Self {
        let message = format!("the stream has no event {cursor}");
        let error = Self::new(StatusCode::CONFLICT, "cursor_out_of_range", message);
        Self { param: Some("last-event-id".into()), ..error }
    }

    /// The event is of another stream, such as an earlier one under the same key.
    pub fn cursor_of_another_stream(id: &str) -> Self {
        let message = format!(
            "the event {id} is not of this stream but of another, which cannot be continued here; without \
             Last-Event-ID this one is read from its start"
        );
        let error = Self::new(StatusCode::CONFLICT, "cursor_of_another_stream", message);
        Self { param: Some("last-event-id".into()), ..error }
    }

    /// The client wants another model than is here.
    pub fn model_digest_mismatch(wanted: &str, served: &str) -> Self {
        let message = format!("the request wants the model {wanted}, and this server has {served}");
        let error = Self::new(StatusCode::CONFLICT, "model_digest_mismatch", message);
        Self { param: Some("glm-model-digest".into()), ..error }
    }

    /// A mistake of this server.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    /// The stable name of what went wrong.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// The body: OpenAI's error object.
    pub fn body(&self) -> Value {
        let kind = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse<BoxBody> {
        let mut response = HttpResponse::build(self.status);
        if let Some(seconds) = self.retry_after_s {
            response.insert_header((header::RETRY_AFTER, seconds));
        }
        if let Some(allowed) = self.allowed {
            response.insert_header((header::ALLOW, allowed));
        }
        if !self.may_heal() {
            response.insert_header(("x-should-retry", "false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.insert_header((header::WWW_AUTHENTICATE, "Bearer"));
        }
        if self.status == StatusCode::UNSUPPORTED_MEDIA_TYPE {
            response.insert_header((header::ACCEPT_ENCODING, "gzip, zstd"));
        }
        json::answer(response, &self.body())
    }
}

fn shortened(mut text: String, max_chars: usize) -> String {
    if let Some((end, _)) = text.char_indices().nth(max_chars) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Retry-After has no parts of a second; to come too early would be refused again.
fn whole_seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis().div_ceil(1000)).unwrap_or(u32::MAX).max(1)
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::InvalidParameter { field, message } => {
                Self::invalid_value(field, format!("{field} {message}"))
            }
            SubmitError::TooLong { .. } => {
                Self::parameter(CONTEXT_LENGTH_EXCEEDED, "messages", error.to_string())
            }
            SubmitError::QueueFull { retry_after, .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, QUEUE_FULL, error.to_string())
                    .retry_after(whole_seconds(retry_after))
            }
            // 429 and not 503: the server is well, and proxies that count 5xx would take a busy
            // replica out and send its share to the others.
            SubmitError::DeadlineUnmeetable { retry_after, .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, DEADLINE_UNMEETABLE, error.to_string())
                    .retry_after(whole_seconds(retry_after))
            }
            SubmitError::QueueTimeUnmeetable { retry_after, .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, QUEUE_TIMEOUT_UNMEETABLE, error.to_string())
                    .retry_after(whole_seconds(retry_after))
            }
            SubmitError::Unavailable(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, error.to_string())
                    .retry_after(RETRY_UNAVAILABLE_S)
            }
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        match error {
            TextError::NoChat => Self::parameter("chat_not_supported", "model", error.to_string()),
            TextError::Conversation { index, .. } => {
                Self::invalid_value(format!("messages[{index}].role"), error.to_string())
            }
            TextError::Load { .. } | TextError::ChatFormat { .. } | TextError::Encode(_) => {
                Self::internal(error.to_string())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_says_when_to_come_back() {
        let retry_after = Duration::from_millis(6100);
        let error = ApiError::from(SubmitError::QueueFull { num_requests: 3, retry_after });
        let response = error.error_response();
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers().get("retry-after").unwrap(), "7");
        assert_eq!(error.body()["error"]["type"], "rate_limit_error");
        let response = ApiError::from(SubmitError::Unavailable("draining")).error_response();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers().get("retry-after").unwrap(), "5");
    }

    #[test]
    fn what_a_client_sent_is_repeated_in_part() {
        let error = ApiError::unknown_parameter("é".repeat(1_000_000));
        assert_eq!(error.to_string().chars().count(), MAX_MESSAGE_CHARS + 1);
        assert_eq!(error.param.unwrap().chars().count(), MAX_PARAM_CHARS + 1);
        assert!(
            ApiError::unknown_parameter("é").to_string().starts_with("unknown parameter: é; leave it out")
        );
    }

    #[test]
    fn parameters_are_named() {
        let error = ApiError::from(SubmitError::InvalidParameter {
            field: "top_p",
            message: "must be above 0".into(),
        });
        let expected = json!({"error": {"message": "top_p must be above 0", "type": "invalid_request_error",
            "param": "top_p", "code": "invalid_value"}});
        assert_eq!(error.body(), expected);
    }
}
