//! Owns the words of the chat API that this client speaks: the request, and the chunks it reads.
//!
//! Invariant: one `data` line becomes the same events whatever server sent it; unknown fields are ignored
//! and missing ones are not invented.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message of `role` that says `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A chat request; what is `None` is left out, so that the server's own default holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ChatRequest {
    /// The model's name.
    pub model: String,
    /// The chat so far.
    pub messages: Vec<Message>,
    /// The most tokens to generate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// The sampling temperature; 0 is greedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// The sampling seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Generate up to `max_tokens` even if the model ends earlier: for benches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignore_eos: Option<bool>,
    /// Any other field of the API, sent as it is.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, Value>,
}

/// One step of a streamed answer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum StreamEvent {
    /// The answer began, in this role.
    Role(String),
    /// More text; never empty.
    Delta(String),
    /// A part of the tool calls, as the server sent it.
    ToolCalls(Value),
    /// Why the answer ended.
    Finish(String),
    /// What the server says the whole answer is, for a reader to check.
    Seal(Seal),
    /// The token counts.
    Usage(Usage),
    /// An SSE comment: a heartbeat or progress.
    Comment(String),
    /// The server gave up in mid-stream and said so.
    Error(ApiError),
    /// `[DONE]`: the answer is whole (or its error was told).
    Done,
}

/// The server's account of a whole answer: the `glm` object of the finish chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// Tokens of the answer.
    pub completion_tokens: u64,
    /// The SHA-256 of the answer's text in UTF-8, in hexadecimal.
    pub text_sha256: String,
}

/// Token counts of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt, the chat template included.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    #[serde(default)]
    pub completion_tokens: u64,
    /// Where the prompt's tokens came from.
    #[serde(default)]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

/// The part of [`Usage`] about the prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokensDetails {
    /// Prompt tokens that the server took from a prefix cache.
    #[serde(default)]
    pub cached_tokens: u64,
}

/// The error object of the OpenAI API.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What went wrong, in words.
    #[serde(default)]
    pub message: String,
    /// The error's class.
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// The error's code: a name in most servers, a number in some.
    #[serde(default)]
    pub code: Option<Value>,
    /// The field of the request that is to blame.
    #[serde(default)]
    pub param: Option<String>,
}

impl ApiError {
    /// Reads `{"error": {...}}`, `{"error": "words"}` or a bare `{"message": ...}`; `None` for anything else.
    pub fn parse(body: &str) -> Option<Self> {
        let body: Value = serde_json::from_str(body).ok()?;
        Self::from_value(body.get("error").unwrap_or(&body))
    }

    fn from_value(error: &Value) -> Option<Self> {
        match error {
            Value::String(message) => Some(Self { message: message.clone(), ..Self::default() }),
            Value::Object(fields) if fields.contains_key("message") => Self::deserialize(error).ok(),
            _ => None,
        }
    }
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    error: Option<Value>,
    /// Not [`Seal`] itself: another server may mean something else by this name.
    #[serde(default)]
    glm: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    delta: Option<Delta>,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Default, Deserialize)]
struct Delta {
    #[serde(default)]
    role: Option<String>,
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    tool_calls: Option<Value>,
}

/// Reads the data of one SSE event named `event` and hands each part of it to `emit`, in order.
///
/// An error is told by the name `error` or by an `error` field; both are in use. The JSON error of data
/// that is no chunk goes to the caller.
pub(crate) fn read_event(
    event: Option<&str>,
    data: &str,
    mut emit: impl FnMut(StreamEvent),
) -> Result<(), serde_json::Error> {
    if data == "[DONE]" {
        emit(StreamEvent::Done);
        return Ok(());
    }
    if event == Some("error") {
        let error = ApiError::parse(data);
        emit(StreamEvent::Error(
            error.unwrap_or_else(|| ApiError { message: data.into(), ..ApiError::default() }),
        ));
        return Ok(());
    }
    let chunk: Chunk = serde_json::from_str(data)?;
    for choice in chunk.choices {
        let delta = choice.delta.unwrap_or_default();
        if let Some(role) = delta.role {
            emit(StreamEvent::Role(role));
        }
        if let Some(text) = delta.content.filter(|text| !text.is_empty()) {
            emit(StreamEvent::Delta(text));
        }
        if let Some(calls) = delta.tool_calls.filter(|calls| !calls.is_null()) {
            emit(StreamEvent::ToolCalls(calls));
        }
        if let Some(reason) = choice.finish_reason {
            emit(StreamEvent::Finish(reason));
        }
    }
    if let Some(seal) = chunk.glm.and_then(|glm| Seal::deserialize(glm).ok()) {
        emit(StreamEvent::Seal(seal));
    }
    if let Some(usage) = chunk.usage {
        emit(StreamEvent::Usage(usage));
    }
    if let Some(error) = chunk.error {
        let error = ApiError::from_value(&error);
        emit(StreamEvent::Error(
            error.unwrap_or_else(|| ApiError { message: data.into(), ..ApiError::default() }),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(event: Option<&str>, data: &str) -> Vec<StreamEvent> {
        let mut events = Vec::new();
        read_event(event, data, |event| events.push(event)).expect("a chunk");
        events
    }

    #[test]
    fn one_chunk_may_hold_everything() {
        let data = json!({
            "id": "chatcmpl-1", "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": {"role": "assistant", "content": "hi", "tool_calls": [{"index": 0}]},
                         "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4,
                      "prompt_tokens_details": {"cached_tokens": 2}},
        });
        assert_eq!(
            read(None, &data.to_string()),
            [
                StreamEvent::Role("assistant".into()),
                StreamEvent::Delta("hi".into()),
                StreamEvent::ToolCalls(json!([{"index": 0}])),
                StreamEvent::Finish("stop".into()),
                StreamEvent::Usage(Usage {
                    prompt_tokens: 3,
                    completion_tokens: 1,
                    prompt_tokens_details: Some(PromptTokensDetails { cached_tokens: 2 }),
                }),
            ]
        );
    }

    #[test]
    fn a_seal_is_read_from_the_glm_object_and_from_nothing_else() {
        let data = json!({
            "choices": [{"delta": {}, "finish_reason": "stop"}],
            "glm": {"completion_tokens": 2, "text_sha256": "ab", "later": 1},
        });
        let seal = Seal { completion_tokens: 2, text_sha256: "ab".into() };
        assert_eq!(
            read(None, &data.to_string()),
            [StreamEvent::Finish("stop".into()), StreamEvent::Seal(seal)]
        );
        assert_eq!(read(None, r#"{"choices":[],"glm":"4"}"#), []);
    }

    #[test]
    fn empty_and_null_parts_are_silent() {
        for data in [
            r#"{"choices":[{"delta":{"content":""},"finish_reason":null}],"usage":null}"#,
            r#"{"choices":[{"delta":{"content":null,"tool_calls":null}}]}"#,
            r#"{"choices":[]}"#,
            r#"{"choices":[{"delta":null}]}"#,
        ] {
            assert_eq!(read(None, data), [], "{data}");
        }
        assert_eq!(read(None, "[DONE]"), [StreamEvent::Done]);
    }

    #[test]
    fn each_form_of_an_error_is_read() {
        let told =
            |message: &str| StreamEvent::Error(ApiError { message: message.into(), ..ApiError::default() });
        assert_eq!(read(Some("error"), "plain words"), [told("plain words")]);
        assert_eq!(read(Some("error"), r#"{"error":{"message":"m"}}"#), [told("m")]);
        assert_eq!(read(None, r#"{"error":"m"}"#), [told("m")]);
        let full = r#"{"error":{"message":"m","type":"t","code":429,"param":"p"}}"#;
        let error = ApiError::parse(full).expect("an error");
        assert_eq!(error.kind.as_deref(), Some("t"));
        assert_eq!(error.code, Some(json!(429)));
        assert_eq!(read(None, full), [StreamEvent::Error(error)]);
        assert_eq!(ApiError::parse("<html>"), None);
        assert_eq!(ApiError::parse(r#"{"detail":"x"}"#), None);
    }

    #[test]
    fn a_request_leaves_out_what_is_not_set() {
        let mut request = ChatRequest {
            model: "m".into(),
            messages: vec![Message::new("user", "hi")],
            max_tokens: Some(3),
            ..ChatRequest::default()
        };
        request.extra.insert("top_k".into(), json!(5));
        assert_eq!(
            serde_json::to_value(&request).expect("it is JSON"),
            json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "top_k": 5})
        );
    }
}
