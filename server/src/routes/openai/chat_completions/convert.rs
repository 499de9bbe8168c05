//! Owns the conversion of a chat completion request into a request to the engine.
//!
//! Invariant: what passes here is complete: every default is filled in and every limit checked that
//! the engine does not check itself. CPU work in proportion to the body.

use glm_engine::{Request, SamplingParams};

use super::request::{ChatCompletionRequest, RequestMessage};
use crate::error::{ApiError, NumTokens};
use crate::random::random_u64;
use crate::state::{AppState, unix_time};
use crate::stream::reply_stream::{Form, ReplyHead};
use crate::text::chat_format::Message;

/// Shorter prompts are tokenised at once: they fit, or cost little more than one that does.
const TYPICAL_TOKEN_BYTES: usize = 4;

/// A request that is ready for the engine, and what its answer needs.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) request: Request,
    pub(super) stop: Vec<String>,
    pub(super) head: ReplyHead,
    pub(super) form: Form,
}

impl Completion {
    pub(super) fn new(request: ChatCompletionRequest<'_>, state: &AppState) -> Result<Self, ApiError> {
        let Some(model) = &request.model else {
            return Err(ApiError::invalid_value("model", "model is missing"));
        };
        let model = model.0.as_ref();
        if !state.model.names.iter().any(|name| name == model) {
            return Err(ApiError::model_not_found(model, &state.model.names));
        }
        if request.stream_options.is_some() && !request.stream {
            return Err(ApiError::invalid_value("stream_options", "stream_options needs stream: true"));
        }
        let prompt_token_ids = encode(&request.messages.0, state)?;
        let sampling = sampling(&request, prompt_token_ids.len(), state)?;
        Ok(Self {
            head: ReplyHead {
                id: format!("chatcmpl-{:016x}{:016x}", random_u64(), random_u64()),
                created: unix_time(),
                model: model.to_owned(),
                fingerprint: state.model.fingerprint.clone(),
                num_prompt_tokens: prompt_token_ids.len(),
                max_tokens: sampling.max_tokens,
            },
            // The deadline comes from headers and the tenant from the key, which are not known here.
            request: Request { prompt_token_ids, sampling, priority: request.priority, ..Request::default() },
            stop: request.stop.0,
            form: match request.stream {
                true => Form::Streamed(request.stream_options.unwrap_or_default().into()),
                false => Form::Plain,
            },
        })
    }
}

fn encode(messages: &[RequestMessage<'_>], state: &AppState) -> Result<Vec<u32>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid_value("messages", "messages must have at least one message"));
    }
    let limit = state.engine.limits().max_model_len;
    let num_bytes: usize = messages.iter().map(|message| message.content.len()).sum();
    // No token spells more than this and each message has a role token, so a prompt can be too long
    // beyond doubt before it is tokenised.
    let least = messages.len() + num_bytes / state.model.tokenizer.vocabulary().max_piece_len();
    if least >= limit {
        return Err(ApiError::prompt_too_long(limit, NumTokens::AtLeast(least)));
    }
    // A prompt far beyond the limit would take the tokeniser, and with it other clients, seconds.
    if num_bytes > limit.saturating_mul(TYPICAL_TOKEN_BYTES) {
        let texts = messages.iter().map(|message| message.content.as_ref());
        if let Some(least) = state.model.tokenizer.exceeds(texts, limit)? {
            return Err(ApiError::prompt_too_long(limit, NumTokens::AtLeast(least)));
        }
    }
    let convert = |message: &RequestMessage<'_>| Message {
        role: message.role,
        content: message.content.clone().into_owned(),
    };
    let messages: Vec<Message> = messages.iter().map(convert).collect();
    let ids = state.model.chat.encode(&messages, &state.model.tokenizer)?;
    if ids.len() >= limit {
        return Err(ApiError::prompt_too_long(limit, NumTokens::Exactly(ids.len())));
    }
    Ok(ids)
}

fn sampling(
    request: &ChatCompletionRequest<'_>,
    num_prompt_tokens: usize,
    state: &AppState,
) -> Result<SamplingParams, ApiError> {
    let room = state.engine.limits().max_model_len - num_prompt_tokens;
    let (max_tokens, min_tokens) = lengths(request, room)?;
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
        temperature: match request.do_sample {
            Some(false) => 0.0,
            _ => request.temperature.or(generation.temperature).unwrap_or(defaults.temperature),
        },
        top_k,
        top_p: request.top_p.or(generation.top_p).unwrap_or(defaults.top_p),
        min_p: request.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: request
            .repetition_penalty
            .or(generation.repetition_penalty)
            .unwrap_or(defaults.repetition_penalty),
        presence_penalty: request.presence_penalty.unwrap_or(defaults.presence_penalty),
        frequency_penalty: request.frequency_penalty.unwrap_or(defaults.frequency_penalty),
        logit_bias: request.logit_bias.0.clone(),
        seed: request.seed.map_or_else(random_u64, i64::cast_unsigned),
        max_tokens,
        min_tokens,
        ignore_eos: request.ignore_eos,
        stop_token_ids: stop_token_ids(request, state)?,
    })
}

/// `max_tokens` and `min_tokens`, cut to the room that the prompt leaves.
fn lengths(request: &ChatCompletionRequest<'_>, room: usize) -> Result<(usize, usize), ApiError> {
    let limits = [request.max_tokens, request.max_completion_tokens];
    let limit = limits.into_iter().filter_map(|limit| limit.0).min();
    let min_tokens = request.min_tokens.map_or(0, |count| count.0);
    if let Some(limit) = limit.filter(|limit| *limit < min_tokens) {
        let message = format!("min_tokens is {min_tokens}, which is more than max_tokens allows ({limit})");
        return Err(ApiError::invalid_value("min_tokens", message));
    }
    let max_tokens = limit.map_or(room, |limit| limit.min(room));
    Ok((max_tokens, min_tokens.min(max_tokens)))
}

/// The model's own, and the request's besides.
fn stop_token_ids(request: &ChatCompletionRequest<'_>, state: &AppState) -> Result<Vec<u32>, ApiError> {
    let vocab_size = state.model.manifest.geometry.vocab_size;
    let mut ids = state.model.manifest.stop_token_ids.clone();
    for (i, id) in request.stop_token_ids.0.iter().enumerate() {
        if *id as usize >= vocab_size {
            let param = format!("stop_token_ids[{i}]");
            let message =
                format!("{param} is {id}, and the model has the token ids from 0 to {}", vocab_size - 1);
            return Err(ApiError::invalid_value(param, message));
        }
        if !ids.contains(id) {
            ids.push(*id);
        }
    }
    Ok(ids)
}
