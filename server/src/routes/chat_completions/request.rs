//! Owns the JSON shape of a chat completion request.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use serde::Deserialize;
use serde_json::Value;

use crate::error::ApiError;
use crate::stream::reply_stream::StreamOptions;

/// The fields that count.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ChatCompletionRequest {
    pub(super) model: Option<String>,
    pub(super) messages: Vec<RequestMessage>,
    pub(super) stream: bool,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) max_tokens: Option<NonZeroUsize>,
    pub(super) max_completion_tokens: Option<NonZeroUsize>,
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    /// -1 and 0 keep all candidates.
    pub(super) top_k: Option<i64>,
    pub(super) repetition_penalty: Option<f32>,
    pub(super) presence_penalty: Option<f32>,
    pub(super) frequency_penalty: Option<f32>,
    pub(super) logit_bias: BTreeMap<String, f32>,
    pub(super) seed: Option<i64>,
    /// A string or a list of them.
    pub(super) stop: Option<Value>,
    pub(super) min_tokens: Option<usize>,
    pub(super) ignore_eos: bool,
    pub(super) priority: i32,
}

#[derive(Debug, Deserialize)]
pub(super) struct RequestMessage {
    pub(super) role: String,
    /// A string or a list of parts.
    #[serde(default)]
    pub(super) content: Value,
}

impl ChatCompletionRequest {
    /// Reads a checked body. Errors name the field by its path.
    pub(super) fn parse(body: Value) -> Result<Self, ApiError> {
        serde_path_to_error::deserialize(body).map_err(|error| {
            let path = error.path().to_string();
            let message = error.inner().to_string();
            let message = match message.rsplit_once(", expected ") {
                Some((_, expected)) => format!("{path} must be {}", in_json_terms(expected)),
                None => format!("{path}: {message}"),
            };
            ApiError::invalid_value(path, message)
        })
    }
}

/// serde expects Rust's types; a client knows JSON's.
fn in_json_terms(expected: &str) -> Cow<'_, str> {
    match expected {
        "f32" => "a number".into(),
        "i32" => format!("an integer from {} to {}", i32::MIN, i32::MAX).into(),
        "i64" => format!("an integer from {} to {}", i64::MIN, i64::MAX).into(),
        "usize" => format!("an integer from 0 to {}", usize::MAX).into(),
        "a nonzero usize" => format!("an integer from 1 to {}", usize::MAX).into(),
        "a sequence" => "a list".into(),
        "a map" => "an object".into(),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn type_errors_name_the_path_and_what_json_may_stand_there() {
        let cases = [
            (json!({"temperature": ", expected x"}), "temperature", "must be a number"),
            (json!({"min_tokens": -1}), "min_tokens", "must be an integer from 0 to 18446744073709551615"),
            (json!({"max_tokens": -1}), "max_tokens", "must be an integer from 1 to 18446744073709551615"),
            (json!({"max_tokens": 0}), "max_tokens", "must be an integer from 1 to"),
            (json!({"max_completion_tokens": "9"}), "max_completion_tokens", "must be an integer from 1 to"),
            (json!({"messages": {}}), "messages", "must be a list"),
            (json!({"messages": [{"role": "user"}, {"role": 3}]}), "messages[1].role", "must be a string"),
            (json!({"messages": [{}]}), "messages[0]", "missing field `role`"),
            (json!({"logit_bias": {"7": "x"}}), "logit_bias.7", "must be a number"),
            (json!({"logit_bias": []}), "logit_bias", "must be an object"),
            (
                json!({"stream_options": {"include_usage": 1}}),
                "stream_options.include_usage",
                "must be a boolean",
            ),
            (json!({"seed": 1.5}), "seed", "-9223372036854775808 to 9223372036854775807"),
            (json!({"top_k": "all"}), "top_k", "must be an integer"),
            (
                json!({"priority": 1u64 << 40}),
                "priority",
                "must be an integer from -2147483648 to 2147483647",
            ),
        ];
        for (body, param, words) in cases {
            let error = ChatCompletionRequest::parse(body).unwrap_err().body();
            assert_eq!(error["error"]["param"], param, "{error}");
            assert_eq!(error["error"]["code"], "invalid_value", "{error}");
            assert!(error["error"]["message"].as_str().unwrap().contains(words), "{error}");
        }
    }
}
