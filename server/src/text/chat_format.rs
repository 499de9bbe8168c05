//! Owns the ways in which messages become a prompt, one for each family of models.
//!
//! Invariant: special ids come from the manifest and are inserted here; what a user wrote passes
//! through the tokenizer only.

use glm_engine::manifest::Chat;

use super::TextError;
use super::tokenizer::Tokenizer;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// A chat format with its special ids.
#[derive(Debug, Clone)]
pub struct ChatFormat {
    default_system: Option<String>,
    style: Style,
}

#[derive(Debug, Clone)]
enum Style {
    /// `[gMASK] sop`, then `<|role|>` `\n` content for each turn; nothing ends a turn.
    ChatGlm3 { prefix: [u32; 2], system: u32, user: u32, assistant: u32 },
    /// `<|im_start|>role\ncontent<|im_end|>\n` for each turn.
    ChatMl { im_start: u32, im_end: u32 },
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

impl ChatFormat {
    /// Finds the format and its ids.
    ///
    /// # Errors
    /// [`TextError::ChatFormat`]: unknown, or a special token is missing in the manifest.
    pub fn new(chat: &Chat) -> Result<Self, TextError> {
        let fail = |message: String| TextError::ChatFormat { format: chat.format.clone(), message };
        let id = |token: &str| {
            let id = chat.special_tokens.get(token).copied();
            id.ok_or_else(|| fail(format!("chat.special_tokens of the manifest lacks {token}")))
        };
        let style = match chat.format.as_str() {
            "chatglm3" => Style::ChatGlm3 {
                prefix: [id("[gMASK]")?, id("sop")?],
                system: id("<|system|>")?,
                user: id("<|user|>")?,
                assistant: id("<|assistant|>")?,
            },
            "chatml" => Style::ChatMl { im_start: id("<|im_start|>")?, im_end: id("<|im_end|>")? },
            _ => return Err(fail("this build knows chatglm3 and chatml".into())),
        };
        Ok(Self { default_system: chat.default_system.clone(), style })
    }

    /// The prompt's ids, up to where the assistant's reply begins.
    ///
    /// # Errors
    /// [`TextError::Encode`]: the tokenizer gave up.
    pub fn encode(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        if let Style::ChatGlm3 { prefix, .. } = self.style {
            ids.extend(prefix);
        }
        let has_system = messages.iter().any(|message| message.role == Role::System);
        let default = self.default_system.iter().filter(|_| !has_system);
        let default = default.map(|content| (Role::System, content.as_str()));
        let given = messages.iter().map(|message| (message.role, message.content.as_str()));
        for (role, content) in default.chain(given) {
            self.push_turn(role, content, tokenizer, &mut ids)?;
        }
        match self.style {
            Style::ChatGlm3 { assistant, .. } => ids.push(assistant),
            Style::ChatMl { im_start, .. } => {
                ids.push(im_start);
                tokenizer.encode_into("assistant\n", &mut ids)?;
            }
        }
        Ok(ids)
    }

    fn push_turn(
        &self,
        role: Role,
        content: &str,
        tokenizer: &Tokenizer,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        match self.style {
            Style::ChatGlm3 { system, user, assistant, .. } => {
                ids.push(match role {
                    Role::System => system,
                    Role::User => user,
                    Role::Assistant => assistant,
                });
                // The line after the role holds a tool's name; for plain turns it is empty.
                tokenizer.encode_into("\n", ids)?;
                tokenizer.encode_into(content, ids)
            }
            Style::ChatMl { im_start, im_end } => {
                ids.push(im_start);
                // One string, as the reference template tokenises what is between two specials.
                tokenizer.encode_into(&format!("{}\n{content}", role.name()), ids)?;
                ids.push(im_end);
                tokenizer.encode_into("\n", ids)
            }
        }
    }

    /// What the model writes before each reply and no client wants to see.
    pub fn reply_prefix(&self) -> &'static str {
        match self.style {
            Style::ChatGlm3 { .. } => "\n ",
            Style::ChatMl { .. } => "",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::fixtures;

    fn message(role: Role, content: &str) -> Message {
        Message { role, content: content.to_owned() }
    }

    fn load(fixture: &fixtures::ModelDir) -> (ChatFormat, Tokenizer) {
        let manifest = fixture.manifest();
        let tokenizer = Tokenizer::load(fixture.path(), &manifest).unwrap();
        (ChatFormat::new(&manifest.chat).unwrap(), tokenizer)
    }

    #[test]
    fn chatglm3_inserts_roles_and_never_reads_them_from_text() {
        let (format, tokenizer) = load(&fixtures::chatglm3());
        let messages = [message(Role::System, "b"), message(Role::User, "a <|user|>")];
        let ids = format.encode(&messages, &tokenizer).unwrap();
        let special: Vec<u32> = ids.iter().copied().filter(|id| *id >= fixtures::FIRST_SPECIAL).collect();
        assert_eq!(special, fixtures::ids(&["[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>"]));
        assert_eq!(format.reply_prefix(), "\n ");
    }

    #[test]
    fn chatml_encodes_each_turn_as_one_string() {
        let (format, tokenizer) = load(&fixtures::chatml());
        let ids = format.encode(&[message(Role::User, "hi")], &tokenizer).unwrap();
        let [start, end] = fixtures::chatml_ids();
        let mut expected = vec![start];
        tokenizer.encode_into("system\nBe kind.", &mut expected).unwrap();
        expected.push(end);
        tokenizer.encode_into("\n", &mut expected).unwrap();
        expected.push(start);
        tokenizer.encode_into("user\nhi", &mut expected).unwrap();
        expected.push(end);
        tokenizer.encode_into("\n", &mut expected).unwrap();
        expected.push(start);
        tokenizer.encode_into("assistant\n", &mut expected).unwrap();
        assert_eq!(ids, expected);

        let with_system = [message(Role::System, "x"), message(Role::User, "hi")];
        let ids = format.encode(&with_system, &tokenizer).unwrap();
        assert_eq!(ids.iter().filter(|id| **id == start).count(), 3, "no second system turn");
    }

    #[test]
    fn an_unknown_format_or_a_missing_token_is_named() {
        let chat = |value| serde_json::from_value::<Chat>(value).unwrap();
        let unknown = chat(json!({"format": "alpaca", "special_tokens": {}, "default_system": null}));
        assert!(ChatFormat::new(&unknown).unwrap_err().to_string().contains("alpaca"));
        let lacking =
            chat(json!({"format": "chatml", "special_tokens": {"<|im_start|>": 1}, "default_system": null}));
        assert!(ChatFormat::new(&lacking).unwrap_err().to_string().contains("<|im_end|>"));
    }

    /// The real tokenizer is not ours to ship: `GLMSERVE_TEST_CHATGLM3_TOKENIZER` names a converted copy.
    /// The conversation and its ids were published in an issue of THUDM/ChatGLM3 (127).
    #[test]
    #[ignore = "needs ChatGLM3's own tokenizer"]
    fn the_real_tokenizer_gives_the_published_ids() {
        let file = std::env::var_os("GLMSERVE_TEST_CHATGLM3_TOKENIZER").expect("the variable names it");
        let (format, tokenizer) = load(&fixtures::chatglm3_with(Path::new(&file)));
        let messages = [
            message(
                Role::System,
                "You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions carefully. Respond using markdown.",
            ),
            message(Role::User, "你好"),
            message(Role::Assistant, "你好👋！我是ChatGLM3，很高兴见到你，欢迎问我任何问题。"),
        ];
        let expected = [
            64790, 64792, 64794, 30910, 13, 809, 383, 22011, 10461, 30944, 30966, 30932, 260, 1796, 3239,
            2092, 7594, 422, 1192, 899, 30923, 30930, 23833, 30930, 5741, 267, 2795, 30953, 30917, 8417,
            7724, 30930, 21911, 1227, 3478, 3536, 30930, 64795, 30910, 13, 36474, 54591, 64796, 30910, 13,
            36474, 54591, 243, 162, 148, 142, 31404, 33030, 30942, 1960, 10461, 30944, 30966, 31123, 48895,
            35214, 54622, 31123, 32616, 39905, 31901, 31639, 31155, 64796,
        ];
        let ids = format.encode(&messages, &tokenizer).unwrap();
        assert_eq!(ids, expected);
    }
}
