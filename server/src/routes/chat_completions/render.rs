//! Owns how the events of a reply look as chat completion JSON, streamed and plain.

use std::collections::VecDeque;

use actix_web::HttpResponse;
use serde::Serialize;

use super::convert::ReplyHead;
use super::types::{
    ChatCompletion, ChatCompletionChunk, Choice, ChunkChoice, Delta, ReplyMessage, StreamOptions, Usage,
};
use crate::error::ApiError;
use crate::stream::event_log::{self, EndReason, Event, LogReader, StreamError};
use crate::stream::sse::Render;

fn finish_reason(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Stop => "stop",
        EndReason::Length => "length",
    }
}

/// The documents of a streamed answer.
#[derive(Debug)]
pub(super) struct Chunks {
    head: ReplyHead,
    options: StreamOptions,
}

impl Chunks {
    pub(super) fn new(head: ReplyHead, options: StreamOptions) -> Self {
        Self { head, options }
    }

    fn chunk(&self, choices: &[ChunkChoice<'_>], usage: Option<Option<Usage>>) -> String {
        let chunk = ChatCompletionChunk {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created,
            model: &self.head.model,
            system_fingerprint: &self.head.fingerprint,
            choices,
            usage,
        };
        to_json(&chunk)
    }

    fn choice(&self, delta: Delta<'_>, reason: Option<EndReason>, usage: event_log::Usage) -> String {
        let usage = match self.options {
            StreamOptions { include_usage: false, .. } => None,
            StreamOptions { continuous_usage_stats, .. } => {
                Some(continuous_usage_stats.then(|| usage.into()))
            }
        };
        let choice = ChunkChoice { index: 0, delta, finish_reason: reason.map(finish_reason) };
        self.chunk(&[choice], usage)
    }
}

impl Render for Chunks {
    fn render(&mut self, event: Event, documents: &mut VecDeque<String>) {
        match event {
            Event::Role => {
                let usage = event_log::Usage {
                    num_prompt_tokens: self.head.num_prompt_tokens,
                    num_generated_tokens: 0,
                };
                let delta = Delta { role: Some("assistant"), content: None };
                documents.push_back(self.choice(delta, None, usage));
            }
            Event::Delta { text, usage } => {
                let delta = Delta { role: None, content: Some(&text) };
                documents.push_back(self.choice(delta, None, usage));
            }
            Event::Finish { reason, usage } => {
                documents.push_back(self.choice(Delta::default(), Some(reason), usage));
                if self.options.include_usage {
                    documents.push_back(self.chunk(&[], Some(Some(usage.into()))));
                }
            }
            Event::Error(error) => documents.push_back(ApiError::from(error).body().to_string()),
        }
    }
}

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value)
        .unwrap_or_else(|error| ApiError::internal(error.to_string()).body().to_string())
}

/// Reads the log to its end and answers in one piece.
///
/// # Errors
/// The reply's own error, with its status.
pub(super) async fn plain(mut reader: LogReader, head: ReplyHead) -> Result<HttpResponse, ApiError> {
    let mut content = String::new();
    loop {
        match reader.next().await {
            Some(Event::Role) => {}
            Some(Event::Delta { text, .. }) => content += &text,
            Some(Event::Finish { reason, usage }) => {
                let message = ReplyMessage { role: "assistant", content, refusal: () };
                let choice = Choice { index: 0, message, logprobs: (), finish_reason: finish_reason(reason) };
                return Ok(HttpResponse::Ok().json(ChatCompletion {
                    id: &head.id,
                    object: "chat.completion",
                    created: head.created,
                    model: &head.model,
                    system_fingerprint: &head.fingerprint,
                    choices: [choice],
                    usage: usage.into(),
                }));
            }
            Some(Event::Error(error)) => return Err(error.into()),
            None => return Err(StreamError::Lost.into()),
        }
    }
}
