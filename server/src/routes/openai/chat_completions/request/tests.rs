//! What is read of a request, what is refused, and how much memory that takes at most.

use serde_json::{Value, json};

use super::*;
use crate::peak_memory::peak_bytes;
use crate::text::chat_format::Role;

/// A body that lacks nothing but `change`.
fn body(change: &Value) -> Vec<u8> {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "x"}]});
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    body.to_string().into_bytes()
}

fn message(message: Value) -> Value {
    json!({"messages": [message]})
}

/// Code, param and message of the refusal.
fn refusal(change: &Value) -> [String; 3] {
    let error = ChatCompletionRequest::parse(&body(change)).unwrap_err().body();
    ["code", "param", "message"].map(|name| error["error"][name].as_str().unwrap_or_default().to_owned())
}

fn hash(change: &Value) -> [u8; 32] {
    ChatCompletionRequest::parse(&body(change)).unwrap().fingerprint()
}

/// What clients send that asks for nothing, or for what this server does anyway.
fn harmless() -> Vec<Value> {
    vec![
        json!({"n": 1, "best_of": 1.0, "logprobs": false, "top_logprobs": 0, "echo": false, "tools": [], "functions": [],
            "tool_choice": "none", "function_call": "auto", "response_format": {"type": "text"}, "modalities": ["text"]}),
        json!({"user": "u", "user_id": "u", "request_id": "r", "safety_identifier": "s", "sensitive_word_check": {"type": "ALL"},
            "watermark_enabled": true, "thinking": {"type": "disabled"}, "tool_stream": true, "meta": {}}),
        json!({"metadata": ""}),
        json!({"metadata": {"a": {"b": [1, "c"]}}, "store": true, "service_tier": "flex", "prompt_cache_key": "k"}),
        json!({"return_function_call": false, "verbosity": "low", "reasoning_effort": "high", "reasoning": {"effort": "low"}}),
        json!({"chat_template_kwargs": {}}),
        json!({"chat_template_kwargs": {"enable_thinking": false, "thinking": null}, "enable_thinking": false}),
        json!({"mirostat": 0, "mirostat_tau": 5.0, "tfs_z": 1, "typical_p": 1.0, "xtc_probability": 0, "repeat_penalty": 1}),
        json!({"stream": true, "stream_options": {"include_obfuscation": true}, "priority": 3}),
        json!({"stop": ""}),
        json!({"stop": []}),
        json!({"stop": ["", ""]}),
        json!({"max_tokens": -1, "max_completion_tokens": null, "made_up": null}),
        json!({"guided_json": null, "documents": [], "bad_words": [], "skip_special_tokens": true, "prediction": {"type": "content"}}),
        message(
            json!({"role": "user", "content": "x", "name": "n", "id": "msg_1", "cache_control": {"type": "ephemeral"},
            "tool_calls": [], "tool_call_id": "", "metadata": "", "prefix": false}),
        ),
        message(
            json!({"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}, "annotations": []}]}),
        ),
        message(json!({"role": "user", "content": ["x"]})),
        message(
            json!({"role": "user", "content": [{"text": "x"}], "reasoning_details": [], "reasoning_content": "I think"}),
        ),
    ]
}

#[test]
fn what_asks_for_nothing_changes_nothing() {
    let plain = hash(&json!({}));
    for change in harmless() {
        assert_eq!(hash(&change), plain, "{change}");
    }
}

#[test]
fn what_can_not_be_honoured_is_refused_by_name_and_with_what_is_supported() {
    for (change, param, words) in [
        (json!({"n": 2}), "n", "only n = 1 is supported"),
        (json!({"n": "1"}), "n", "only n = 1 is supported"),
        (json!({"logprobs": true}), "logprobs", "log probabilities are not supported"),
        (json!({"tools": [{}]}), "tools", "tool calls are not supported"),
        (json!({"tool_choice": "required"}), "tool_choice", "only none and auto are"),
        (json!({"tool_choice": {"type": "function"}}), "tool_choice", "only none and auto are"),
        (
            json!({"response_format": {"type": "json_object"}}),
            "response_format",
            r#"only {"type": "text"} is supported"#,
        ),
        (json!({"response_format": {}}), "response_format", "only"),
        (json!({"modalities": ["text", "audio"]}), "modalities", "only"),
        (json!({"thinking": {"type": "enabled"}}), "thinking", "the model does not reason"),
        (
            json!({"chat_template_kwargs": {"enable_thinking": true}}),
            "chat_template_kwargs",
            "only an empty object",
        ),
        (json!({"chat_template_kwargs": {"tools": false}}), "chat_template_kwargs", "only an empty object"),
        (json!({"mirostat": 2}), "mirostat", "only 0"),
        (json!({"cache_salt": "s"}), "cache_salt", "salt"),
        (message(json!({"role": "tool", "content": "x"})), "messages[0].role", "role tool are not supported"),
        (
            message(json!({"role": "assistant", "tool_calls": [{"id": 1}]})),
            "messages[0].tool_calls",
            "tool calls",
        ),
        (message(json!({"role": "user", "prefix": true})), "messages[0].prefix", "only false"),
        (
            message(json!({"role": "user", "content": [{"image_url": {"url": "x".repeat(100)}}]})),
            "messages[0].content[0].image_url",
            "images are not supported",
        ),
        (
            message(
                json!({"role": "user", "content": [{"type": "text", "text": ""}, {"type": "image_url"}]}),
            ),
            "messages[0].content[1].type",
            "parts of type image_url are not supported, only text is",
        ),
    ] {
        let [code, found, message] = refusal(&change);
        assert_eq!((code.as_str(), found.as_str()), ("unsupported_parameter", param), "{change}");
        assert!(message.starts_with(&format!("{param}: ")) && message.contains(words), "{change}: {message}");
    }
    for (change, param) in [
        (json!({"temprature": 1}), "temprature"),
        (json!({"stream_options": {"x": 1}}), "stream_options.x"),
        (message(json!({"role": "user", "speaker": 1})), "messages[0].speaker"),
        (message(json!({"role": "user", "content": [{"x": 1}]})), "messages[0].content[0].x"),
    ] {
        assert_eq!(refusal(&change)[..2], ["unknown_parameter", param], "{change}");
    }
}

#[test]
fn wrong_values_are_named_in_the_terms_of_json() {
    let long = "x".repeat(1025);
    let many_biases: Value =
        (0..1025).map(|id| (id.to_string(), json!(1))).collect::<serde_json::Map<_, _>>().into();
    for (change, param, words) in [
        (json!({"max_tokens": 0}), "max_tokens", "must be an integer of at least 1, or -1 (or left out)"),
        (json!({"max_tokens": -2}), "max_tokens", "must be an integer of at least 1"),
        (json!({"max_tokens": 1.5}), "max_tokens", "must be an integer of at least 1"),
        (json!({"max_completion_tokens": "9"}), "max_completion_tokens", "must be an integer of at least 1"),
        (json!({"min_tokens": -1}), "min_tokens", "must be an integer of at least 0"),
        (json!({"messages": {}}), "messages", "must be a list"),
        (
            json!({"messages": [{"role": "user", "content": ""}, {"role": 3}]}),
            "messages[1].role",
            "must be a string",
        ),
        (json!({"messages": [["user", "x"]]}), "messages[0]", "must be an object"),
        (json!({"messages": [null]}), "messages[0]", "must be an object"),
        (message(json!({"content": "x"})), "messages[0].role", "is missing"),
        (
            message(json!({"role": "k".repeat(9999)})),
            "messages[0].role",
            "must be system, developer, user or assistant",
        ),
        (message(json!({"role": "user"})), "messages[0].content", "must be a string or a list of text parts"),
        (
            message(json!({"role": "user", "content": null})),
            "messages[0].content",
            "must be a string or a list",
        ),
        (message(json!({"role": "user", "content": 1})), "messages[0].content", "must be a string or a list"),
        (
            message(json!({"role": "user", "content": [{"type": "text"}]})),
            "messages[0].content[0]",
            "must be {",
        ),
        (message(json!({"role": "user", "content": [null]})), "messages[0].content[0]", "must be {"),
        (
            message(json!({"role": "user", "content": "", "refusal": "x"})),
            "messages[0].refusal",
            "assistant messages only",
        ),
        (json!({"logit_bias": {"7": "x"}}), "logit_bias.7", "must be a number"),
        (json!({"logit_bias": {"7": null}}), "logit_bias.7", "must be a number"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias.x", "is not a token id"),
        (json!({"logit_bias": {"7": 1, "07": 1}}), "logit_bias.7", "is given twice"),
        (json!({"logit_bias": []}), "logit_bias", "must be an object"),
        (json!({"logit_bias": many_biases}), "logit_bias", "must have at most 1024 tokens"),
        (json!({"stop": [1]}), "stop[0]", "must be a string"),
        (json!({"stop": vec!["x"; 65]}), "stop", "must have at most 64 entries"),
        (json!({"stop": long}), "stop", "must have at most 1024 bytes"),
        (json!({"stop": ["x", long]}), "stop[1]", "must have at most 1024 bytes"),
        (json!({"stop_token_ids": vec![1; 129]}), "stop_token_ids", "must have at most 128 entries"),
        (json!({"stop_token_ids": [1, -1]}), "stop_token_ids[1]", "must be an integer from 0 to 4294967295"),
        (json!({"model": long}), "model", "must have at most 1024 bytes"),
        (json!({"stream_options": [true]}), "stream_options", "must be an object"),
        (
            json!({"stream_options": {"include_usage": 1}}),
            "stream_options.include_usage",
            "must be true or false",
        ),
        (json!({"top_k": "all"}), "top_k", "must be an integer"),
        (json!({"priority": 1u64 << 40}), "priority", "must be an integer from -2147483648 to 2147483647"),
    ] {
        let [code, found, message] = refusal(&change);
        assert_eq!((code.as_str(), found.as_str()), ("invalid_value", param), "{message}");
        assert!(message.starts_with(&format!("{param} {words}")) || message.contains(words), "{message}");
        assert!(message.len() < 300, "{message}");
    }
}

#[test]
fn limits_of_tokens_are_read_however_they_are_written() {
    for (text, expected) in [
        ("16", Some(16)),
        ("16.0", Some(16)),
        ("1e3", Some(1000)),
        ("-1", None),
        ("null", None),
        ("18446744073709551615", Some(usize::MAX)),
        ("1e30", Some(usize::MAX)),
    ] {
        let body = format!(r#"{{"max_tokens": {text}}}"#);
        assert_eq!(
            ChatCompletionRequest::parse(body.as_bytes()).unwrap().max_tokens,
            TokenLimit(expected),
            "{text}"
        );
    }
}

#[test]
fn what_an_assistant_said_may_be_empty_or_a_refusal() {
    for (message, expected) in [
        (json!({"content": null}), ""),
        (json!({}), ""),
        (json!({"content": "a", "refusal": null}), "a"),
        (json!({"content": null, "refusal": "no"}), "no"),
        (json!({"content": [{"type": "refusal", "refusal": "n\n"}, {"type": "text", "text": "o"}]}), "n\no"),
        (
            json!({"content": "", "tool_calls": [], "audio": null, "function_call": null, "annotations": [{"a": 1}]}),
            "",
        ),
    ] {
        let mut message = message;
        message["role"] = json!("assistant");
        let body = body(&json!({"messages": [message]}));
        let request = ChatCompletionRequest::parse(&body).unwrap();
        let [found] = request.messages.0.as_slice() else { panic!("{request:?}") };
        assert_eq!((found.role, &*found.content), (Role::Assistant, expected), "{message}");
    }
}

#[test]
fn delivery_is_not_part_of_the_fingerprint_and_what_changes_the_reply_is() {
    let plain = hash(&json!({}));
    assert_eq!(
        hash(&json!({"stream": true, "stream_options": {"include_usage": true}, "priority": 1})),
        plain
    );
    for change in [
        json!({"model": "n"}),
        json!({"messages": [{"role": "system", "content": "x"}]}),
        json!({"messages": [{"role": "user", "content": "y"}]}),
        json!({"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}),
        json!({"max_tokens": 1}),
        json!({"min_tokens": 1}),
        json!({"temperature": 1}),
        json!({"do_sample": false}),
        json!({"top_p": 1}),
        json!({"top_k": 1}),
        json!({"min_p": 0.5}),
        json!({"logit_bias": {"1": 1}}),
        json!({"seed": 1}),
        json!({"stop": "x"}),
        json!({"stop_token_ids": [1]}),
        json!({"ignore_eos": true}),
    ] {
        assert_ne!(hash(&change), plain, "{change}");
    }
}

/// As large as the largest body that the server reads by default.
const MAX_BODY_BYTES: usize = 8 << 20;

/// As many of `entry` as there is room for, between `start` and `end`.
fn filled(start: &str, entry: &str, end: &str) -> Vec<u8> {
    let num_entries = (MAX_BODY_BYTES - start.len() - end.len()) / entry.len();
    format!("{start}{}{end}", entry.repeat(num_entries).trim_end_matches(',')).into_bytes()
}

#[test]
fn no_body_takes_more_than_a_small_multiple_of_its_size() {
    const CONTENT: &str = r#"{"messages":[{"role":"user","content":""#;
    let names: String = (0..700_000).map(|i| format!("\"x{i}\":1,")).collect();
    let nulls: String = (0..500_000).map(|i| format!("\"x{i}\":null,")).collect();
    let ids: String = (0..700_000).map(|i| format!("\"{i}\":1,")).collect();
    for (name, body) in [
        ("numbers as stops", filled(r#"{"stop":["#, "0,", "]}")),
        ("stops", filled(r#"{"stop":["#, "\"\",", "]}")),
        ("stop ids", filled(r#"{"stop_token_ids":["#, "0,", "]}")),
        ("biases", format!(r#"{{"logit_bias":{{{}}}}}"#, ids.trim_end_matches(',')).into_bytes()),
        ("messages", filled(r#"{"messages":["#, r#"{"role":"assistant"},"#, "]}")),
        ("parts", filled(r#"{"messages":[{"role":"user","content":["#, r#"{"text":""},"#, "]}]}")),
        (
            "parts that grow",
            filled(
                r#"{"messages":[{"role":"user","content":["#,
                &format!(r#"{{"text":"{}"}},"#, "x".repeat(999)),
                "]}]}",
            ),
        ),
        ("metadata", filled(r#"{"metadata":{"a":["#, "[],", "]}}")),
        ("nesting", filled(r#"{"metadata":"#, "[", "")),
        ("nesting that is refused", filled(r#"{"tools":"#, "[{\"\":", "")),
        ("names that nobody knows", format!("{{{}}}", names.trim_end_matches(',')).into_bytes()),
        ("null under names that nobody knows", format!("{{{}}}", nulls.trim_end_matches(',')).into_bytes()),
        ("a name", filled("{\"", "x", "\":1}")),
        ("a name in escapes", filled("{\"", "\\u0301", "\":1}")),
        ("a string", filled(CONTENT, "x", "\"}]}")),
        ("a string in escapes", filled(CONTENT, "\\n", "\"}]}")),
        ("a string with one escape", filled(CONTENT, "x", "\\n\"}]}")),
        ("a string for a number", filled("{\"temperature\":\"", "\u{301}", "\"}")),
        ("a string that is refused", filled("{\"tools\":\"", "\\u0301", "\"}")),
        ("a model", filled("{\"model\":\"", "\\u0301", "\"}")),
        ("a role", filled("{\"messages\":[{\"role\":\"", "\\u0301", "\"}]}")),
    ] {
        assert!(body.len() <= MAX_BODY_BYTES && body.len() > MAX_BODY_BYTES / 2, "{name}: {}", body.len());
        let peak = peak_bytes(|| ChatCompletionRequest::parse(&body).map(|request| request.fingerprint()));
        // A buffer that grows is there twice for a moment; the rest is for the path and the error.
        assert!(
            peak <= 3 * body.len() + 4096,
            "{name}: {:.2} times the body",
            peak as f64 / body.len() as f64
        );
    }
}
