//! Owns how the events of a reply look as chat completion JSON, streamed and plain.

use actix_web::HttpResponse;

use super::types::{
    ChatCompletion, ChatCompletionChunk, Choice, ChunkChoice, Delta, Glm, ReplyMessage, Usage,
};
use crate::error::ApiError;
use crate::json;
use crate::stream::event::{self, EndReason, Event, StreamError};
use crate::stream::event_log::LogReader;
use crate::stream::reply_stream::{ReplyHead, StreamOptions};
use crate::stream::sse::{Documents, Render};

fn finish_reason(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Stop { .. } => "stop",
        EndReason::Length => "length",
    }
}

/// The documents of a streamed answer.
#[derive(Debug)]
pub(in crate::routes) struct Chunks {
    head: ReplyHead,
    options: StreamOptions,
}

impl Chunks {
    pub(in crate::routes) fn new(head: ReplyHead, options: StreamOptions) -> Self {
        Self { head, options }
    }

    fn chunk<'a>(
        &'a self,
        choices: &'a [ChunkChoice<'a>],
        usage: Option<Option<Usage>>,
        glm: Option<Glm<'a>>,
    ) -> ChatCompletionChunk<'a> {
        ChatCompletionChunk {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created,
            model: &self.head.model,
            system_fingerprint: &self.head.fingerprint,
            choices,
            usage,
            glm,
        }
    }

    fn usage(&self, usage: event::Usage) -> Option<Option<Usage>> {
        match self.options {
            StreamOptions { include_usage: false, .. } => None,
            StreamOptions { continuous_usage_stats, .. } => {
                Some(continuous_usage_stats.then(|| usage.into()))
            }
        }
    }

    fn delta(&self, documents: &mut Documents<'_>, delta: Delta<'_>, usage: event::Usage) {
        let choice = ChunkChoice { delta, ..ChunkChoice::default() };
        documents.push(&self.chunk(&[choice], self.usage(usage), None));
    }
}

impl Render for Chunks {
    fn render(&mut self, event: Event, documents: &mut Documents<'_>) {
        match event {
            Event::Role => {
                let usage = event::Usage {
                    num_prompt_tokens: self.head.num_prompt_tokens,
                    ..event::Usage::default()
                };
                self.delta(documents, Delta { role: Some("assistant"), content: Some("") }, usage);
            }
            Event::Delta { text, usage } => {
                self.delta(documents, Delta { role: None, content: Some(&text) }, usage);
            }
            Event::Finish { reason, usage, text_sha256 } => {
                let finish_reason = Some(finish_reason(reason));
                let choice = ChunkChoice { finish_reason, ..ChunkChoice::default() };
                let glm = glm(&self.head, usage, &text_sha256);
                documents.push(&self.chunk(&[choice], self.usage(usage), Some(glm)));
                if self.options.include_usage {
                    documents.push(&self.chunk(&[], Some(Some(usage.into())), None));
                }
            }
            Event::Error(error) => documents.push(&ApiError::from(error).body()),
        }
    }
}

fn glm<'a>(head: &ReplyHead, usage: event::Usage, text_sha256: &'a str) -> Glm<'a> {
    Glm { completion_tokens: usage.num_generated_tokens, max_tokens: head.max_tokens, text_sha256 }
}

/// Reads the log to its end and answers in one piece.
///
/// # Errors
/// The reply's own error, with its status.
pub(in crate::routes) async fn plain(
    mut reader: LogReader,
    head: &ReplyHead,
) -> Result<HttpResponse, ApiError> {
    let mut content = String::new();
    while let Some(logged) = reader.next().await? {
        match logged.event {
            Event::Role => {}
            Event::Delta { text, .. } => content += &text,
            Event::Finish { reason, usage, text_sha256 } => {
                let message = ReplyMessage { role: "assistant", content, refusal: (), annotations: [] };
                let choice = Choice { index: 0, message, logprobs: (), finish_reason: finish_reason(reason) };
                let completion = ChatCompletion {
                    id: &head.id,
                    object: "chat.completion",
                    created: head.created,
                    model: &head.model,
                    system_fingerprint: &head.fingerprint,
                    choices: [choice],
                    usage: usage.into(),
                    glm: glm(head, usage, &text_sha256),
                };
                return Ok(json::answer(HttpResponse::Ok(), &completion));
            }
            Event::Error(error) => return Err(error.into()),
        }
    }
    Err(StreamError::Lost.into())
}
