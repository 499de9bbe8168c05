//! ChatML: `<|im_start|>role\ncontent<|im_end|>\n` for each turn.

use super::format::{Format, Specials};
use super::message::Role;
use crate::text::TextError;
use crate::text::tokenizer::Tokenizer;

#[derive(Debug)]
pub(super) struct ChatMl {
    start: u32,
    end: u32,
}

impl ChatMl {
    pub(super) fn new(specials: &Specials<'_>) -> Result<Self, TextError> {
        Ok(Self { start: specials.id("<|im_start|>")?, end: specials.id("<|im_end|>")? })
    }
}

impl Format for ChatMl {
    fn encode(
        &self,
        turns: &[(Role, &str)],
        tokenizer: &Tokenizer,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        for (role, content) in turns {
            let name = match role {
                Role::System => "system",
                Role::User => "user",
                Role::Assistant => "assistant",
            };
            ids.push(self.start);
            // One string, as the reference template tokenises what is between two specials.
            tokenizer.encode_into(&format!("{name}\n{content}"), ids)?;
            ids.push(self.end);
            tokenizer.encode_into("\n", ids)?;
        }
        ids.push(self.start);
        tokenizer.encode_into("assistant\n", ids)
    }
}
