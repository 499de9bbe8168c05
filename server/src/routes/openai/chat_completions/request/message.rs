//! Owns the messages of a chat completion request, and their parts.
//!
//! Invariant: a message that was read has a role that the chat formats know and a text.

use std::borrow::Cow;

use serde::de::{Error, MapAccess, SeqAccess};
use sha2::Sha256;

use crate::fields::shape::Shape;
use crate::fields::{Canonical, Ignored, Read, Reader, Refused, Text, fields, read_list};
use crate::text::chat_format::Role;

/// More have no room in any context, as each takes a token at least.
pub(in super::super) const MAX_MESSAGES: usize = 1 << 16;
/// Most parts of one message.
pub(in super::super) const MAX_PARTS: usize = 1 << 14;
/// How much of a wrong role or type an error repeats.
const MAX_SHOWN_CHARS: usize = 50;

/// The conversation.
#[derive(Debug, Default)]
pub(in super::super) struct Messages<'a>(pub(in super::super) Vec<RequestMessage<'a>>);

/// A message.
#[derive(Debug)]
pub(in super::super) struct RequestMessage<'a> {
    pub(in super::super) role: Role,
    /// All its parts.
    pub(in super::super) content: Cow<'a, str>,
}

fields! {
    /// A message as it is written.
    pub(in super::super) struct MessageFields<'a> {
        #[honoured] /// `system`, `developer`, `user` or `assistant`. Required.
        role: Option<Role>,
        #[honoured] /// A string, or a list of text parts. It may be null or missing in an assistant's message.
        content: Option<Content<'a>>,
        #[honoured] /// What an assistant said in place of a content.
        refusal: Option<Cow<'a, str>>,

        #[no_effect] /// The chat formats have no place for a speaker's name.
        name: Ignored,
        #[no_effect] /// Names the message.
        id: Ignored,
        #[no_effect] /// The prefix cache needs no hints.
        cache_control: Ignored,
        #[no_effect] /// Earlier reasoning is not part of a prompt.
        reasoning_content: Ignored,
        #[no_effect] /// Earlier reasoning is not part of a prompt.
        reasoning: Ignored,
        #[no_effect] /// Earlier reasoning is not part of a prompt.
        reasoning_details: Ignored,
        #[no_effect] /// Earlier reasoning is not part of a prompt.
        thinking_blocks: Ignored,
        #[no_effect] /// Remarks on an earlier reply.
        annotations: Ignored,
        #[no_effect] /// An earlier reply as the client parsed it.
        parsed: Ignored,
        #[no_effect] /// What a client library keeps beside an earlier reply.
        provider_specific_fields: Ignored,

        #[refused(unless Shape::is_empty, "tool calls are not supported")]
        tool_calls: Refused,
        #[refused(unless Shape::is_empty, "tool calls are not supported")]
        tool_call_id: Refused,
        #[refused(unless Shape::is_empty, "function calls are not supported")]
        function_call: Refused,
        #[refused(unless Shape::is_empty, "tool calls are not supported, only an empty string is")]
        metadata: Refused,
        #[refused(unless Shape::is_empty, "audio is not supported")]
        audio: Refused,
        #[refused(unless Shape::is_false, "only false is supported: a reply is always a new message")]
        prefix: Refused,
        #[refused(unless Shape::is_false, "only false is supported: a reply is always a new message")]
        partial: Refused,
    }
}

fields! {
    /// A part of a content as it is written.
    pub(in super::super) struct PartFields<'a> {
        #[honoured] /// `text`, or in an assistant's message `refusal`.
        kind: PartType = "type",
        #[honoured] /// The text.
        text: Option<Cow<'a, str>>,
        #[honoured] /// The text of a refusal.
        refusal: Option<Cow<'a, str>>,

        #[no_effect] /// The prefix cache needs no hints.
        cache_control: Ignored,
        #[no_effect] /// Remarks on an earlier reply.
        annotations: Ignored,

        #[refused(unless Shape::is_empty, "images are not supported")]
        image_url: Refused,
        #[refused(unless Shape::is_empty, "audio is not supported")]
        input_audio: Refused,
        #[refused(unless Shape::is_empty, "audio is not supported")]
        audio_url: Refused,
        #[refused(unless Shape::is_empty, "video is not supported")]
        video_url: Refused,
        #[refused(unless Shape::is_empty, "files are not supported")]
        file: Refused,
    }
}

impl<'de> Read<'de> for Messages<'de> {
    const EXPECTED: &'static str = "a list";

    fn list<A: SeqAccess<'de>>(list: A, reader: &Reader) -> Result<Self, A::Error> {
        let mut messages = Vec::new();
        read_list(list, MAX_MESSAGES, reader, |message| messages.push(message))?;
        Ok(Self(messages))
    }
}

impl Canonical for Messages<'_> {
    fn feed(&self, hasher: &mut Sha256) {
        self.0.as_slice().feed(hasher);
    }
}

impl<'de> Read<'de> for RequestMessage<'de> {
    const EXPECTED: &'static str = "an object";

    fn object<A: MapAccess<'de>>(map: A, reader: &Reader) -> Result<Self, A::Error> {
        let MessageFields { role, content, refusal, .. } = MessageFields::object(map, reader)?;
        let role = role.ok_or_else(|| reader.invalid_field("role", "is missing"))?;
        let content = content.map(|content| content.0);
        let refusal = refusal.filter(|refusal| !refusal.is_empty());
        let content = match (role, content, refusal) {
            (Role::Assistant, content, refusal) => {
                let content = content.filter(|content| !content.is_empty());
                content.or(refusal).unwrap_or_default()
            }
            (_, _, Some(_)) => {
                return Err(reader.invalid_field("refusal", "belongs to assistant messages only"));
            }
            (_, Some(content), None) => content,
            (_, None, None) => {
                return Err(reader.invalid_field("content", &format!("must be {}", Content::EXPECTED)));
            }
        };
        Ok(Self { role, content })
    }
}

impl Canonical for RequestMessage<'_> {
    fn feed(&self, hasher: &mut Sha256) {
        self.role.feed(hasher);
        self.content.feed(hasher);
    }
}

impl<'de> Read<'de> for Role {
    const EXPECTED: &'static str = "a string";

    fn text<E: Error>(role: Text<'de, '_>, reader: &Reader) -> Result<Self, E> {
        match role.as_str() {
            "system" | "developer" => Ok(Self::System),
            "user" => Ok(Self::User),
            "assistant" => Ok(Self::Assistant),
            role @ ("tool" | "function" | "observation") => {
                Err(reader.unsupported(&format!("messages of role {role} are not supported")))
            }
            role => {
                let role = shown(role);
                Err(reader.invalid(&format!("must be system, developer, user or assistant, not {role:?}")))
            }
        }
    }
}

impl Canonical for Role {
    fn feed(&self, hasher: &mut Sha256) {
        (*self as u8).feed(hasher);
    }
}

/// A string, or the texts of parts one after the other.
#[derive(Debug, Default)]
pub(in super::super) struct Content<'a>(Cow<'a, str>);

impl<'de> Read<'de> for Content<'de> {
    const EXPECTED: &'static str = "a string or a list of text parts";

    fn text<E: Error>(text: Text<'de, '_>, _: &Reader) -> Result<Self, E> {
        Ok(Self(text.into_cow()))
    }

    fn list<A: SeqAccess<'de>>(list: A, reader: &Reader) -> Result<Self, A::Error> {
        let mut content = Cow::Borrowed("");
        read_list(list, MAX_PARTS, reader, |Part(text)| match content.is_empty() {
            true => content = text,
            false => content.to_mut().push_str(&text),
        })?;
        Ok(Self(content))
    }
}

impl Canonical for Content<'_> {
    fn feed(&self, hasher: &mut Sha256) {
        self.0.feed(hasher);
    }
}

/// The text of one part.
struct Part<'a>(Cow<'a, str>);

impl<'de> Read<'de> for Part<'de> {
    const EXPECTED: &'static str = r#"{"type": "text", "text": "…"}"#;

    fn text<E: Error>(text: Text<'de, '_>, _: &Reader) -> Result<Self, E> {
        Ok(Self(text.into_cow()))
    }

    fn object<A: MapAccess<'de>>(map: A, reader: &Reader) -> Result<Self, A::Error> {
        let PartFields { kind, text, refusal, .. } = PartFields::object(map, reader)?;
        let text = match kind {
            PartType::Text => text,
            PartType::Refusal => refusal,
        };
        text.map(Self).ok_or_else(|| reader.unexpected(Self::EXPECTED))
    }
}

/// What kind of part it is.
#[derive(Debug, Default, Clone, Copy)]
pub(in super::super) enum PartType {
    #[default]
    Text,
    Refusal,
}

impl<'de> Read<'de> for PartType {
    const EXPECTED: &'static str = "a string";

    fn text<E: Error>(kind: Text<'de, '_>, reader: &Reader) -> Result<Self, E> {
        match kind.as_str() {
            "text" => Ok(Self::Text),
            "refusal" => Ok(Self::Refusal),
            kind => {
                Err(reader
                    .unsupported(&format!("parts of type {} are not supported, only text is", shown(kind))))
            }
        }
    }
}

impl Canonical for PartType {
    fn feed(&self, hasher: &mut Sha256) {
        (*self as u8).feed(hasher);
    }
}

fn shown(text: &str) -> String {
    text.chars().take(MAX_SHOWN_CHARS).collect()
}
