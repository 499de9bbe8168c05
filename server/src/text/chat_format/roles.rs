//! Formats in which a token names who speaks, and nothing ends a turn: ChatGLM3, GLM-4 and GLM-Edge.

use super::format::{Format, Specials};
use super::message::Role;
use crate::text::TextError;
use crate::text::tokenizer::Tokenizer;

#[derive(Debug)]
pub(super) struct Roles {
    system: u32,
    user: u32,
    assistant: u32,
    /// Whether the line's end and the content are one text for the tokenizer.
    is_joined: bool,
    reply_prefix: &'static str,
}

impl Roles {
    fn new(specials: &Specials<'_>, is_joined: bool, reply_prefix: &'static str) -> Result<Self, TextError> {
        Ok(Self {
            system: specials.id("<|system|>")?,
            user: specials.id("<|user|>")?,
            assistant: specials.id("<|assistant|>")?,
            is_joined,
            reply_prefix,
        })
    }

    /// The space is sentencepiece's mark of a text's start.
    pub(super) fn chatglm3(specials: &Specials<'_>) -> Result<Self, TextError> {
        Self::new(specials, false, "\n ")
    }

    /// The line apart from the content, as the authors' tokenizer has it.
    pub(super) fn glm4(specials: &Specials<'_>) -> Result<Self, TextError> {
        Self::new(specials, false, "\n")
    }

    /// One string, as the authors' template is tokenised.
    pub(super) fn glm_edge(specials: &Specials<'_>) -> Result<Self, TextError> {
        Self::new(specials, true, "\n")
    }
}

impl Format for Roles {
    fn encode(
        &self,
        turns: &[(Role, &str)],
        tokenizer: &Tokenizer,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        for (role, content) in turns {
            ids.push(match role {
                Role::System => self.system,
                Role::User => self.user,
                Role::Assistant => self.assistant,
            });
            if self.is_joined {
                tokenizer.encode_into(&format!("\n{content}"), ids)?;
                continue;
            }
            // The line after the role holds a tool's name; for plain turns it is empty.
            tokenizer.encode_into("\n", ids)?;
            tokenizer.encode_into(content, ids)?;
        }
        ids.push(self.assistant);
        Ok(())
    }

    fn reply_prefix(&self) -> &'static str {
        self.reply_prefix
    }
}
