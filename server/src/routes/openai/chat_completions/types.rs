//! Owns the JSON shapes of the answers to chat completions.

use serde::Serialize;

use crate::stream::event;

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct PromptTokensDetails {
    cached_tokens: usize,
}

impl From<event::Usage> for Usage {
    fn from(usage: event::Usage) -> Self {
        Self {
            prompt_tokens: usage.num_prompt_tokens,
            completion_tokens: usage.num_generated_tokens,
            total_tokens: usage.num_prompt_tokens + usage.num_generated_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.num_cached_tokens },
        }
    }
}

/// What a reader can check a complete reply against; this server's own extension.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Glm<'a> {
    pub(super) completion_tokens: usize,
    /// Most tokens that the reply could have had.
    pub(super) max_tokens: usize,
    /// Of the choice's whole text in UTF-8, in hexadecimal.
    pub(super) text_sha256: &'a str,
}

#[derive(Debug, Serialize)]
pub(super) struct ChatCompletionChunk<'a> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) system_fingerprint: &'a str,
    pub(super) choices: &'a [ChunkChoice<'a>],
    /// `Some(None)` is a null, which OpenAI sends where usage was asked for and comes later.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) glm: Option<Glm<'a>>,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct ChunkChoice<'a> {
    pub(super) index: u32,
    pub(super) delta: Delta<'a>,
    /// Always null; OpenAI's chunks have it, and strict clients expect it.
    pub(super) logprobs: (),
    pub(super) finish_reason: Option<&'static str>,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<&'a str>,
}

#[derive(Debug, Serialize)]
pub(super) struct ChatCompletion<'a> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) system_fingerprint: &'a str,
    pub(super) choices: [Choice; 1],
    pub(super) usage: Usage,
    pub(super) glm: Glm<'a>,
}

#[derive(Debug, Serialize)]
pub(super) struct Choice {
    pub(super) index: u32,
    pub(super) message: ReplyMessage,
    /// Always null, and required by OpenAI's schema.
    pub(super) logprobs: (),
    pub(super) finish_reason: &'static str,
}

#[derive(Debug, Serialize)]
pub(super) struct ReplyMessage {
    pub(super) role: &'static str,
    pub(super) content: String,
    /// Always null, and required by OpenAI's schema.
    pub(super) refusal: (),
    /// Always empty, as OpenAI sends it.
    pub(super) annotations: [(); 0],
}
