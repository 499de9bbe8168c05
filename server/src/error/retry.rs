//! Owns the decision whether a client is told not to send a refused request again.

use actix_web::http::StatusCode;

use super::{ApiError, REPLY_TOO_LARGE, REQUEST_TIMEOUT};

impl ApiError {
    /// Whether the same request, sent again, may be answered otherwise.
    ///
    /// OpenAI's clients send again what was answered with 408, 409, 429 or any 5xx, unless the answer says
    /// `x-should-retry: false`. A conflict is in the request; a reply that is too large, or takes longer than
    /// it may in all, will be again, and would be generated again.
    pub(super) fn may_heal(&self) -> bool {
        match self.status {
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => true,
            status => status.is_server_error() && ![REPLY_TOO_LARGE, REQUEST_TIMEOUT].contains(&self.code),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use actix_web::ResponseError;
    use glm_engine::{SequenceError, SubmitError};

    use super::*;
    use crate::stream::event::StreamError;
    use crate::stream::time_limits::Limit;

    #[test]
    fn what_a_retry_cannot_heal_says_so_and_nothing_else_does() {
        let second = Duration::from_secs(1);
        let cases: [(ApiError, u16, bool); 13] = [
            (ApiError::model_digest_mismatch("a", "b"), 409, false),
            (ApiError::cursor_out_of_range("9.0"), 409, false),
            (ApiError::stream_not_resumable(), 409, false),
            (StreamError::TooLarge("number of bytes").into(), 500, false),
            (ApiError::invalid_api_key(), 401, false),
            (ApiError::invalid_value("n", "n must be 1"), 400, false),
            (ApiError::stream_gone(), 410, false),
            (ApiError::draining(), 503, true),
            (SubmitError::QueueFull { num_requests: 1, retry_after: second }.into(), 429, true),
            (StreamError::Timeout(Limit::Total, second).into(), 504, false),
            (StreamError::Timeout(Limit::Queue, second).into(), 504, true),
            (StreamError::Sequence(SequenceError::Run(String::new())).into(), 500, true),
            (ApiError::body_timeout(60), 408, true),
        ];
        for (error, status, may_heal) in cases {
            let response = error.error_response();
            let header = response.headers().get("x-should-retry").map(|value| value.as_bytes());
            let expected = if may_heal { None } else { Some(b"false".as_slice()) };
            assert_eq!((response.status().as_u16(), header), (status, expected), "{error:?}");
        }
    }
}
