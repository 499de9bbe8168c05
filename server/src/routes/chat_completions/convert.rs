//! Owns the conversion of a chat completion request into a request to the engine.
//!
//! Invariant: what passes here is complete: every default is filled in and every limit checked that
//! the engine does not check itself. CPU work in proportion to the body.

use std::num::NonZeroUsize;

use glm_engine::{Request, SamplingParams};
use serde_json::Value;

use super::request::{ChatCompletionRequest, RequestMessage};
use crate::error::ApiError;
use crate::random::random_u64;
use crate::state::{AppState, unix_time};
use crate::stream::reply_stream::{Form, ReplyHead};
use crate::text::chat_format::{Message, Role};

/// OpenAI's limit.
const MAX_STOPS: usize = 4;
/// A longer one would hold back too much text.
const MAX_STOP_BYTES: usize = 1024;

/// A request that is ready for the engine, and what its answer needs.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) request: Request,
    pub(super) stop: Vec<String>,
    pub(super) head: ReplyHead,
    pub(super) form: Form,
}

impl Completion {
    pub(super) fn from_json(body: Value, state: &AppState) -> Result<Self, ApiError> {
        let request = ChatCompletionRequest::parse(body)?;
        let Some(model) = request.model.clone() else {
            return Err(ApiError::invalid_value("model", "model is missing"));
        };
        if !state.model.names.contains(&model) {
            return Err(ApiError::model_not_found(&model, &state.model.names));
        }
        if request.stream_options.is_some() && !request.stream {
            return Err(ApiError::invalid_value("stream_options", "stream_options needs stream: true"));
        }
        let stop = stop_strings(request.stop.as_ref())?;
        let messages = messages(&request.messages)?;
        let prompt_token_ids = encode(&messages, state)?;
        let sampling = sampling(&request, prompt_token_ids.len(), state)?;
        Ok(Self {
            head: ReplyHead {
                id: format!("chatcmpl-{:016x}{:016x}", random_u64(), random_u64()),
                created: unix_time(),
                model,
                fingerprint: state.model.fingerprint.clone(),
                num_prompt_tokens: prompt_token_ids.len(),
            },
            // The deadline comes from headers and the tenant from the key, which are not known here.
            request: Request { prompt_token_ids, sampling, priority: request.priority, ..Request::default() },
            stop,
            form: match request.stream {
                true => Form::Streamed(request.stream_options.unwrap_or_default()),
                false => Form::Plain,
            },
        })
    }
}

fn stop_strings(stop: Option<&Value>) -> Result<Vec<String>, ApiError> {
    let fail = || {
        let message = format!(
            "stop must be a string or up to {MAX_STOPS} of them, each of 1 to {MAX_STOP_BYTES} bytes"
        );
        ApiError::invalid_value("stop", message)
    };
    let list = match stop {
        None => &[],
        Some(Value::Array(list)) => list.as_slice(),
        Some(value) => std::slice::from_ref(value),
    };
    if list.len() > MAX_STOPS {
        return Err(fail());
    }
    list.iter()
        .map(|value| match value {
            Value::String(stop) if (1..=MAX_STOP_BYTES).contains(&stop.len()) => Ok(stop.clone()),
            _ => Err(fail()),
        })
        .collect()
}

fn messages(messages: &[RequestMessage]) -> Result<Vec<Message>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid_value("messages", "messages must have at least one message"));
    }
    let convert = |(i, message): (usize, &RequestMessage)| {
        let path = format!("messages[{i}]");
        Ok(Message { role: role(&message.role, &path)?, content: content(&message.content, &path)? })
    };
    messages.iter().enumerate().map(convert).collect()
}

fn role(role: &str, path: &str) -> Result<Role, ApiError> {
    let param = format!("{path}.role");
    match role {
        "system" | "developer" => Ok(Role::System),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "tool" | "function" => {
            let message = format!("{param}: messages of role {role} are not supported");
            Err(ApiError::unsupported_parameter(param, message))
        }
        _ => {
            let message = format!("{param} must be system, developer, user or assistant, not {role:?}");
            Err(ApiError::invalid_value(param, message))
        }
    }
}

fn content(content: &Value, path: &str) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let mut text = String::new();
            for (i, part) in parts.iter().enumerate() {
                text += text_part(part, &format!("{path}.content[{i}]"))?;
            }
            Ok(text)
        }
        _ => {
            let message = format!("{path}.content must be a string or a list of text parts");
            Err(ApiError::invalid_value(format!("{path}.content"), message))
        }
    }
}

fn text_part<'a>(part: &'a Value, path: &str) -> Result<&'a str, ApiError> {
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (Some("text") | None, _) => {
            let message = format!(r#"{path} must be {{"type": "text", "text": "…"}}"#);
            Err(ApiError::invalid_value(path, message))
        }
        (Some(kind), _) => {
            let message = format!("{path}: parts of type {kind} are not supported");
            Err(ApiError::unsupported_parameter(format!("{path}.type"), message))
        }
    }
}

fn encode(messages: &[Message], state: &AppState) -> Result<Vec<u32>, ApiError> {
    let limit = state.engine.limits().max_model_len;
    let num_bytes: usize = messages.iter().map(|message| message.content.len()).sum();
    // No token spells more than this and each message has a role token, so a prompt can be too long
    // beyond doubt before it is tokenised.
    let least = messages.len() + num_bytes / state.model.tokenizer.vocabulary().max_piece_len();
    if least >= limit {
        return Err(ApiError::prompt_too_long(limit, &format!("at least {least}")));
    }
    let ids = state.model.chat.encode(messages, &state.model.tokenizer)?;
    if ids.len() >= limit {
        return Err(ApiError::prompt_too_long(limit, &ids.len().to_string()));
    }
    Ok(ids)
}

fn sampling(
    request: &ChatCompletionRequest,
    num_prompt_tokens: usize,
    state: &AppState,
) -> Result<SamplingParams, ApiError> {
    let limit = state.engine.limits().max_model_len;
    let room = limit - num_prompt_tokens;
    let within = |max: NonZeroUsize, param: &'static str| match max.get() {
        max if max > room => Err(ApiError::reply_too_long(limit, num_prompt_tokens, max, param)),
        max => Ok(max),
    };
    let max_tokens = match (request.max_tokens, request.max_completion_tokens) {
        (Some(old), Some(new)) if old != new => {
            let message = format!("max_completion_tokens is {new} and max_tokens is {old}; give one of them");
            return Err(ApiError::invalid_value("max_completion_tokens", message));
        }
        (_, Some(max)) => within(max, "max_completion_tokens")?,
        (Some(max), None) => within(max, "max_tokens")?,
        (None, None) => room,
    };
    let defaults = SamplingParams::default();
    let generation = &state.model.manifest.generation;
    let top_k = match request.top_k {
        None => generation.top_k.unwrap_or(defaults.top_k),
        Some(-1) => 0,
        Some(top_k) => u32::try_from(top_k).map_err(|_| {
            let message = format!("top_k must be an integer from -1 to {}, not {top_k}", u32::MAX);
            ApiError::invalid_value("top_k", message)
        })?,
    };
    Ok(SamplingParams {
        temperature: request.temperature.or(generation.temperature).unwrap_or(defaults.temperature),
        top_k,
        top_p: request.top_p.or(generation.top_p).unwrap_or(defaults.top_p),
        repetition_penalty: request
            .repetition_penalty
            .or(generation.repetition_penalty)
            .unwrap_or(defaults.repetition_penalty),
        presence_penalty: request.presence_penalty.unwrap_or(defaults.presence_penalty),
        frequency_penalty: request.frequency_penalty.unwrap_or(defaults.frequency_penalty),
        logit_bias: logit_bias(request)?,
        seed: request.seed.map_or_else(random_u64, i64::cast_unsigned),
        max_tokens,
        min_tokens: request.min_tokens.unwrap_or(0),
        ignore_eos: request.ignore_eos,
        stop_token_ids: state.model.manifest.stop_token_ids.clone(),
    })
}

fn logit_bias(request: &ChatCompletionRequest) -> Result<Vec<(u32, f32)>, ApiError> {
    let convert = |(id, bias): (&String, &f32)| {
        let number = id.parse().map_err(|_| {
            let message = format!("logit_bias: {id:?} is not a token id");
            ApiError::invalid_value(format!("logit_bias.{id}"), message)
        });
        Ok((number?, *bias))
    };
    let mut biases = request.logit_bias.iter().map(convert).collect::<Result<Vec<_>, ApiError>>()?;
    biases.sort_unstable_by_key(|&(id, _)| id);
    // "7" and "07" are two keys of one token, whose sum could leave the range of either.
    if let Some(twice) = biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let message = format!("logit_bias has token {} twice", twice[0].0);
        return Err(ApiError::invalid_value(format!("logit_bias.{}", twice[0].0), message));
    }
    Ok(biases)
}
