//! Owns the classes of request fields: honoured, without effect, refused by name.
//!
//! Invariant: a field that would change the reply and is not honoured is never ignored.

use serde_json::{Map, Value};

use crate::error::ApiError;

/// What a field is to this server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Its value counts.
    Honoured,
    /// Whatever its value is here, it changes nothing.
    NoEffect,
    /// Part of the API or of a peer's, and not of this server.
    Unsupported,
    /// Nobody knows it.
    Unknown,
}
use Class::{Honoured, NoEffect, Unknown, Unsupported};

/// The fields of a request whose value counts.
pub(in crate::routes) const HONOURED: [&str; 18] = [
    "model",
    "messages",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "min_tokens",
    "ignore_eos",
    "priority",
];

/// A request's body without the fields that have no effect; refuses those that can't be honoured.
pub(super) fn read(body: &[u8]) -> Result<Value, ApiError> {
    checked(serde_json::from_slice(body).map_err(|error| ApiError::invalid_json(&error))?)
}

fn checked(mut body: Value) -> Result<Value, ApiError> {
    let request = as_object(&mut body, "body")?;
    check(request, "", of_request)?;
    if let Some(options) = request.get_mut("stream_options") {
        check(as_object(options, "stream_options")?, "stream_options.", of_stream_options)?;
    }
    let messages = request.get_mut("messages").and_then(Value::as_array_mut);
    for (i, message) in messages.into_iter().flatten().enumerate() {
        let path = format!("messages[{i}]");
        let message = as_object(message, &path)?;
        check(message, &format!("{path}."), of_message)?;
        let parts = message.get_mut("content").and_then(Value::as_array_mut);
        for (j, part) in parts.into_iter().flatten().enumerate() {
            let path = format!("{path}.content[{j}]");
            check(as_object(part, &path)?, &format!("{path}."), of_part)?;
        }
    }
    Ok(body)
}

/// serde would take a list for a struct, field by field.
fn as_object<'a>(value: &'a mut Value, path: &str) -> Result<&'a mut Map<String, Value>, ApiError> {
    let error = || ApiError::invalid_value(path, format!("{path} must be an object"));
    value.as_object_mut().ok_or_else(error)
}

fn check(
    object: &mut Map<String, Value>,
    path: &str,
    classify: fn(&str, &Value) -> Class,
) -> Result<(), ApiError> {
    for (name, value) in object.iter().filter(|(_, value)| !value.is_null()) {
        let param = format!("{path}{name}");
        match classify(name, value) {
            Honoured | NoEffect => {}
            Unsupported => {
                let message = format!("{param} is not supported with this value; leave it out");
                return Err(ApiError::unsupported_parameter(param, message));
            }
            Unknown => return Err(ApiError::unknown_parameter(param)),
        }
    }
    object.retain(|name, value| !value.is_null() && classify(name, value) == Honoured);
    Ok(())
}

/// Supported only where the value asks for nothing.
fn neutral(is_neutral: bool) -> Class {
    if is_neutral { NoEffect } else { Unsupported }
}

fn is_one_of(value: &Value, names: &[&str]) -> bool {
    value.as_str().is_some_and(|value| names.contains(&value))
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty)
}

fn is_number(value: &Value, number: f64) -> bool {
    value.as_f64() == Some(number)
}

fn of_request(name: &str, value: &Value) -> Class {
    match name {
        name if HONOURED.contains(&name) => Honoured,
        // They name or route a request, or steer tool calls that are not there.
        "user"
        | "metadata"
        | "safety_identifier"
        | "prompt_cache_key"
        | "prompt_cache_retention"
        | "request_id"
        | "parallel_tool_calls" => NoEffect,
        "n" | "best_of" | "length_penalty" => neutral(is_number(value, 1.0)),
        "top_logprobs" | "min_p" => neutral(is_number(value, 0.0)),
        "typical_p" => neutral(is_number(value, 1.0)),
        "store"
        | "logprobs"
        | "echo"
        | "use_beam_search"
        | "include_stop_str_in_output"
        | "continue_final_message"
        | "add_special_tokens"
        | "return_token_ids"
        | "return_tokens_as_token_ids" => neutral(*value == Value::Bool(false)),
        "skip_special_tokens" | "spaces_between_special_tokens" | "add_generation_prompt" => {
            neutral(*value == Value::Bool(true))
        }
        "tools"
        | "functions"
        | "stop_token_ids"
        | "bad_words"
        | "documents"
        | "chat_template_kwargs"
        | "logits_processors" => neutral(is_empty(value)),
        "tool_choice" | "function_call" => neutral(is_one_of(value, &["none", "auto"])),
        "service_tier" => neutral(is_one_of(value, &["auto", "default"])),
        "reasoning_effort" => neutral(is_one_of(value, &["none"])),
        "response_format" => neutral(is_one_of(&value["type"], &["text"])),
        "modalities" => neutral(value.as_array().is_some_and(|v| v.iter().all(|v| is_one_of(v, &["text"])))),
        "audio"
        | "prediction"
        | "verbosity"
        | "web_search_options"
        | "chat_template"
        | "guided_json"
        | "guided_regex"
        | "guided_choice"
        | "guided_grammar"
        | "structured_outputs"
        | "prompt_logprobs"
        | "allowed_token_ids"
        | "truncate_prompt_tokens"
        | "grammar"
        | "json_schema"
        | "mirostat"
        | "typical"
        | "tfs_z" => Unsupported,
        _ => Unknown,
    }
}

fn of_stream_options(name: &str, value: &Value) -> Class {
    match name {
        "include_usage" | "continuous_usage_stats" | "heartbeat" => Honoured,
        "include_obfuscation" => neutral(*value == Value::Bool(false)),
        _ => Unknown,
    }
}

fn of_message(name: &str, value: &Value) -> Class {
    match name {
        "role" | "content" => Honoured,
        // The formats have no place for a speaker's name.
        "name" => NoEffect,
        "tool_calls" | "annotations" => neutral(is_empty(value)),
        "refusal" | "reasoning_content" | "reasoning" => neutral(is_one_of(value, &[""])),
        "tool_call_id" | "function_call" | "audio" | "prefix" => Unsupported,
        _ => Unknown,
    }
}

fn of_part(name: &str, _: &Value) -> Class {
    match name {
        "type" | "text" => Honoured,
        "cache_control" => NoEffect,
        "image_url" | "input_audio" | "file" | "refusal" | "video_url" | "audio_url" => Unsupported,
        _ => Unknown,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn run(value: Value) -> Result<Value, Value> {
        checked(value).map_err(|error| error.body()["error"].clone())
    }

    #[test]
    fn fields_without_effect_disappear() {
        let request = json!({"model": "m", "n": 1, "user": "u", "tools": [], "tool_choice": "none", "seed": null,
            "store": false, "logprobs": false, "response_format": {"type": "text"}, "service_tier": "auto",
            "metadata": {"a": "b"}, "made_up": null, "top_logprobs": 0, "parallel_tool_calls": true,
            "messages": [{"role": "user", "content": "x", "name": "n", "tool_calls": []}]});
        let expected = json!({"model": "m", "messages": [{"role": "user", "content": "x"}]});
        assert_eq!(run(request), Ok(expected));
    }

    #[test]
    fn only_objects_of_json_are_read() {
        let error = |body: &[u8]| (read(body).unwrap_err().code(), read(body).unwrap_err().body());
        assert_eq!(error(b"{").0, "invalid_json");
        for (body, param) in [
            ("[]", "body"),
            (r#"{"messages": [["user", "x"]]}"#, "messages[0]"),
            (r#"{"stream_options": [true]}"#, "stream_options"),
        ] {
            let (code, body) = error(body.as_bytes());
            assert_eq!((code, &body["error"]["param"]), ("invalid_value", &json!(param)), "{body}");
        }
    }

    #[test]
    fn what_can_not_be_honoured_is_refused_by_name() {
        let cases = [
            (json!({"n": 2}), "n", "unsupported_parameter"),
            (json!({"logprobs": true}), "logprobs", "unsupported_parameter"),
            (json!({"tools": [{}]}), "tools", "unsupported_parameter"),
            (json!({"response_format": {"type": "json_object"}}), "response_format", "unsupported_parameter"),
            (json!({"temprature": 1}), "temprature", "unknown_parameter"),
            (json!({"stream_options": {"x": 1}}), "stream_options.x", "unknown_parameter"),
            (
                json!({"messages": [{"role": "user", "speaker": 1}]}),
                "messages[0].speaker",
                "unknown_parameter",
            ),
            (
                json!({"messages": [{"content": [{"type": "image_url", "image_url": {}}]}]}),
                "messages[0].content[0].image_url",
                "unsupported_parameter",
            ),
        ];
        for (request, param, code) in cases {
            let error = run(request).unwrap_err();
            assert_eq!(
                (error["param"].as_str(), error["code"].as_str()),
                (Some(param), Some(code)),
                "{error}"
            );
        }
    }
}
