//! Owns the ways in which messages become a prompt, one for each kind of model.
//!
//! Invariant: special ids come from the manifest and are inserted here and below; what a user wrote
//! passes through the tokenizer only.

mod chatglm2;
mod chatml;
mod format;
mod message;
mod roles;

use std::sync::Arc;

use glm_engine::model::manifest::Chat;

use self::chatglm2::ChatGlm2;
use self::chatml::ChatMl;
use self::format::{Format, Specials};
pub use self::message::{Message, Role};
use self::roles::Roles;
use super::TextError;
use super::tokenizer::Tokenizer;

/// A chat format with its special ids.
#[derive(Debug, Clone)]
pub struct ChatFormat {
    default_system: Option<String>,
    /// Before every text; empty for most models that were not made by GLM's authors.
    prefix: Vec<u32>,
    /// `None` for a base model.
    format: Option<Arc<dyn Format>>,
}

impl ChatFormat {
    /// Finds the format and its ids.
    ///
    /// # Errors
    /// [`TextError::ChatFormat`]: unknown, or a special token is missing in the manifest.
    pub fn new(chat: &Chat) -> Result<Self, TextError> {
        let specials = Specials(chat);
        let (prefix, format): (_, Option<Arc<dyn Format>>) = match chat.format.as_str() {
            "chatglm2" => (specials.ids(&["[gMASK]", "sop"])?, Some(Arc::new(ChatGlm2))),
            "chatglm3" => (specials.ids(&["[gMASK]", "sop"])?, Some(Arc::new(Roles::chatglm3(&specials)?))),
            "glm4" => (specials.ids(&["[gMASK]", "<sop>"])?, Some(Arc::new(Roles::glm4(&specials)?))),
            "glm-edge" => (Vec::new(), Some(Arc::new(Roles::glm_edge(&specials)?))),
            "chatml" => (Vec::new(), Some(Arc::new(ChatMl::new(&specials)?))),
            // The authors' tokenizers put the same before a base model's text as before a chat.
            "none" => {
                let sop = ["sop", "<sop>"].map(|sop| specials.ids(&["[gMASK]", sop]).ok());
                (sop.into_iter().flatten().next().unwrap_or_default(), None)
            }
            _ => {
                return Err(TextError::ChatFormat {
                    format: chat.format.clone(),
                    message: "this build knows chatglm2, chatglm3, glm4, glm-edge, chatml and none".into(),
                });
            }
        };
        Ok(Self { default_system: chat.default_system.clone(), prefix, format })
    }

    /// The prompt's ids, up to where the assistant's reply begins.
    ///
    /// # Errors
    /// [`TextError::NoChat`]: a base model. [`TextError::Conversation`]: the format has no way to say it.
    /// [`TextError::Encode`]: the tokenizer gave up.
    pub fn encode(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
        let format = self.format.as_ref().ok_or(TextError::NoChat)?;
        let has_system = messages.iter().any(|message| message.role == Role::System);
        let default = self.default_system.iter().filter(|_| !has_system);
        let default = default.map(|content| (Role::System, content.as_str()));
        let given = messages.iter().map(|message| (message.role, message.content.as_str()));
        let turns: Vec<_> = default.chain(given).collect();
        let mut ids = self.prefix.clone();
        format.encode(&turns, tokenizer, &mut ids).map_err(|error| match error {
            // Counted among the messages that the client sent.
            TextError::Conversation { index, message } => {
                TextError::Conversation { index: index - (turns.len() - messages.len()), message }
            }
            error => error,
        })?;
        Ok(ids)
    }

    /// The ids of a text that the model is to go on with, whatever its format.
    ///
    /// # Errors
    /// [`TextError::Encode`]: the tokenizer gave up.
    pub fn encode_text(&self, text: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
        let mut ids = self.prefix.clone();
        tokenizer.encode_into(text, &mut ids)?;
        Ok(ids)
    }

    /// Whether there is a way to chat; a base model has none.
    pub fn has_chat(&self) -> bool {
        self.format.is_some()
    }

    /// What the model writes before each reply and no client wants to see.
    pub fn reply_prefix(&self) -> &'static str {
        self.format.as_ref().map_or("", |format| format.reply_prefix())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::fixtures::{self, ModelDir};

    fn message(role: Role, content: &str) -> Message {
        Message { role, content: content.to_owned() }
    }

    fn load(fixture: &ModelDir) -> (ChatFormat, Tokenizer) {
        let manifest = fixture.manifest();
        let tokenizer = Tokenizer::load(fixture.path(), &manifest).unwrap();
        (ChatFormat::new(&manifest.chat).unwrap(), tokenizer)
    }

    /// The ids of `parts`: special tokens where they are spelt like one, texts else.
    fn ids(fixture: &ModelDir, tokenizer: &Tokenizer, parts: &[&str]) -> Vec<u32> {
        let specials = fixture.manifest().chat.special_tokens;
        let mut ids = Vec::new();
        for part in parts {
            match specials.get(*part) {
                Some(id) => ids.push(*id),
                None => tokenizer.encode_into(part, &mut ids).unwrap(),
            }
        }
        ids
    }

    #[test]
    fn each_format_as_its_authors_write_it() {
        let conversation = [
            message(Role::System, "s"),
            message(Role::User, "a"),
            message(Role::Assistant, "\nb"),
            message(Role::User, " c"),
        ];
        let rounds = "[Round 1]\n\n问：a\n\n答：\nb\n\n[Round 2]\n\n问：s c\n\n答：";
        #[rustfmt::skip]
        let expected: [(ModelDir, &[&str], &str); 5] = [
            (fixtures::chatglm2(), &["[gMASK]", "sop", rounds], ""),
            (fixtures::chatglm3(), &["[gMASK]", "sop", "<|system|>", "\n", "s", "<|user|>", "\n", "a",
                "<|assistant|>", "\n", "\nb", "<|user|>", "\n", " c", "<|assistant|>"], "\n "),
            (fixtures::glm4(), &["[gMASK]", "<sop>", "<|system|>", "\n", "s", "<|user|>", "\n", "a",
                "<|assistant|>", "\n", "\nb", "<|user|>", "\n", " c", "<|assistant|>"], "\n"),
            (fixtures::glm_edge(), &["<|system|>", "\ns", "<|user|>", "\na", "<|assistant|>", "\n\nb",
                "<|user|>", "\n c", "<|assistant|>"], "\n"),
            (fixtures::chatml(), &["<|im_start|>", "system\ns", "<|im_end|>", "\n",
                "<|im_start|>", "user\na", "<|im_end|>", "\n", "<|im_start|>", "assistant\n\nb", "<|im_end|>",
                "\n", "<|im_start|>", "user\n c", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"], ""),
        ];
        for (fixture, parts, prefix) in expected {
            let (format, tokenizer) = load(&fixture);
            let found = format.encode(&conversation, &tokenizer).unwrap();
            assert_eq!(found, ids(&fixture, &tokenizer, parts), "{}", fixture.manifest().chat.format);
            assert_eq!(format.reply_prefix(), prefix);
        }
    }

    #[test]
    fn no_user_writes_a_special_token() {
        for fixture in fixtures::all_chats() {
            let (format, tokenizer) = load(&fixture);
            let specials = fixture.manifest().chat.special_tokens;
            let of = |content: &str| {
                let ids = format.encode(&[message(Role::User, content)], &tokenizer).unwrap();
                ids.into_iter()
                    .filter(|id| specials.values().any(|special| special == id))
                    .collect::<Vec<_>>()
            };
            let plain = of("x");
            for token in specials.keys() {
                for content in [token.clone(), format!("a{token}b"), format!("\n{token}\n{token}")] {
                    assert_eq!(of(&content), plain, "{}: {content:?}", fixture.manifest().chat.format);
                }
            }
        }
    }

    #[test]
    fn a_default_system_message_gives_way_to_the_clients() {
        let fixture = fixtures::chatml();
        let (format, tokenizer) = load(&fixture);
        let ids = |messages: &[Message]| format.encode(messages, &tokenizer).unwrap();
        let user = message(Role::User, "hi");
        let default = ids(std::slice::from_ref(&user));
        assert_eq!(default, ids(&[message(Role::System, "Be kind."), user.clone()]));
        assert_ne!(default, ids(&[message(Role::System, "x"), user]));
    }

    #[test]
    fn what_rounds_cannot_say_is_refused_by_message() {
        let (format, tokenizer) = load(&fixtures::chatglm2());
        let cases = [
            (vec![Role::Assistant], 0),
            (vec![Role::User, Role::User], 1),
            (vec![Role::User, Role::Assistant], 1),
            (vec![Role::System], 0),
            (vec![Role::User, Role::System, Role::User], 1),
        ];
        for (roles, wrong) in cases {
            let messages: Vec<_> = roles.iter().map(|role| message(*role, "x")).collect();
            let error = format.encode(&messages, &tokenizer).unwrap_err();
            let found = matches!(error, TextError::Conversation { index, .. } if index == wrong);
            assert!(found, "{roles:?}: {error}");
        }
    }

    #[test]
    fn a_base_model_goes_on_with_a_text_and_does_not_chat() {
        let fixture = fixtures::base();
        let (format, tokenizer) = load(&fixture);
        let error = format.encode(&[message(Role::User, "x")], &tokenizer).unwrap_err();
        assert!(matches!(error, TextError::NoChat) && !format.has_chat());
        let expected = ids(&fixture, &tokenizer, &["[gMASK]", "sop", "The <|user|>"]);
        assert_eq!(format.encode_text("The <|user|>", &tokenizer).unwrap(), expected);
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

        // What ms-swift's tests have as ChatGLM2's own; both models have this tokenizer.
        let (format, tokenizer) = load(&fixtures::chatglm2_with(Path::new(&file)));
        let expected = [
            64790, 64792, 790, 30951, 517, 30910, 30939, 30996, 13, 13, 54761, 31211, 30939, 30943, 30966,
            30972, 30970, 31011, 30943, 30966, 30972, 30980, 31514, 13, 13, 55437, 31211,
        ];
        let ids = format.encode(&[message(Role::User, "12345+234=？")], &tokenizer).unwrap();
        assert_eq!(ids, expected);
    }
}
