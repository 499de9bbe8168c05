//! Owns what a client is told of a reply that ended badly after it was accepted.

use actix_web::http::StatusCode;
use glm_engine::SequenceError;

use super::{
    ApiError, FIRST_TOKEN_TIMEOUT, INTER_TOKEN_TIMEOUT, QUEUE_TIMEOUT, REPLY_TOO_LARGE, REQUEST_TIMEOUT,
    RETRY_UNAVAILABLE_S,
};
use crate::stream::event::StreamError;
use crate::stream::time_limits::Limit;

impl From<StreamError> for ApiError {
    fn from(error: StreamError) -> Self {
        let (status, code) = match &error {
            StreamError::Refused(error) => return error.clone().into(),
            StreamError::Timeout(limit, _) | StreamError::ReaderTimeout(limit, _) => {
                let code = match limit {
                    Limit::Queue => QUEUE_TIMEOUT,
                    Limit::FirstToken => FIRST_TOKEN_TIMEOUT,
                    Limit::InterToken => INTER_TOKEN_TIMEOUT,
                    Limit::Total => REQUEST_TIMEOUT,
                };
                (StatusCode::GATEWAY_TIMEOUT, code)
            }
            // A status that clients do not retry by themselves: this end was asked for.
            StreamError::Aborted(_) => (StatusCode::GONE, "aborted"),
            StreamError::Sequence(SequenceError::Run(_)) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "model_failed")
            }
            StreamError::Sequence(SequenceError::NonFiniteLogits { .. }) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "non_finite_logits")
            }
            StreamError::Sequence(SequenceError::CannotSample(_)) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "cannot_sample")
            }
            StreamError::Sequence(SequenceError::ShuttingDown) => {
                (StatusCode::SERVICE_UNAVAILABLE, "shutting_down")
            }
            StreamError::Sequence(SequenceError::EngineDied) => {
                (StatusCode::SERVICE_UNAVAILABLE, "engine_died")
            }
            StreamError::Sequence(SequenceError::DeviceLost(_)) => {
                (StatusCode::SERVICE_UNAVAILABLE, "device_lost")
            }
            StreamError::TooLarge(_) => (StatusCode::INTERNAL_SERVER_ERROR, REPLY_TOO_LARGE),
            StreamError::Lost => (StatusCode::INTERNAL_SERVER_ERROR, "reply_lost"),
        };
        let message = match &error {
            // The runtime's own words name nodes and files: they are for the log.
            StreamError::Sequence(SequenceError::Run(details)) => {
                tracing::error!(details, "a step failed");
                "the model failed on this request".to_owned()
            }
            _ => error.to_string(),
        };
        let error = Self::new(status, code, message);
        match status {
            StatusCode::SERVICE_UNAVAILABLE => error.retry_after(RETRY_UNAVAILABLE_S),
            _ => error,
        }
    }
}
