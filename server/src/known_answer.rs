//! Owns the known answer: a generation that the warm-up records is asked again after a fault, and until the engine
//! gives it the server is unready.
//!
//! Invariant: overload can't fail it, as it asks for tokens, not for speed, and never queues behind
//! users. It is greedy, so a healthy engine has one answer.

use glm_engine::{EngineHandle, EventReceiver, Request, SamplingParams, SequenceError, TokenEvent};

use crate::serve_error::ServeError;
use crate::served_model::ServedModel;
use crate::text::chat_format::{Message, Role};

/// Enough to go through prefill and several decodes, and short beside any request.
const NUM_TOKENS: usize = 4;
/// Tokens of a prompt that costs far more than a step does, and still only seconds on a slow machine.
const LONG_PROMPT: usize = 128;
/// The first may do first-time work of that size.
const NUM_LONG_PROMPTS: usize = 2;

/// A prompt and what follows it.
#[derive(Debug)]
pub(crate) struct KnownAnswer {
    request: Request,
    token_ids: Vec<u32>,
}

/// Generates twice, so that no client pays for first-time work, and returns the answer. A long prompt and a
/// short one tell the engine what a step costs and what a token does, before it has to promise anything.
///
/// # Errors
/// [`ServeError`]: a generation failed, or the two differ.
pub(crate) async fn warm_up(model: &ServedModel, engine: &EngineHandle) -> Result<KnownAnswer, ServeError> {
    let request = request(model, engine)?;
    let token_ids = generate(engine.submit_probe(request.clone())?).await?;
    let again = generate(engine.submit_probe(request.clone())?).await?;
    if token_ids != again {
        return Err(ServeError::Unsteady { first: token_ids, second: again });
    }
    for _ in 0..NUM_LONG_PROMPTS {
        generate(engine.submit_probe(long(&request, engine.limits().max_model_len))?).await?;
    }
    Ok(KnownAnswer { request, token_ids })
}

/// Asks the engine for the known answer.
///
/// # Errors
/// Says what came instead.
pub(crate) async fn ask(engine: &EngineHandle, known: &KnownAnswer) -> Result<(), String> {
    let events = engine.submit_probe(known.request.clone()).map_err(|error| error.to_string())?;
    let found = generate(events).await.map_err(|error| error.to_string())?;
    match found == known.token_ids {
        true => Ok(()),
        false => Err(format!("the answer is {found:?}, and was {:?}", known.token_ids)),
    }
}

fn request(model: &ServedModel, engine: &EngineHandle) -> Result<Request, ServeError> {
    let (chat, tokenizer, content) = (&model.chat, &model.tokenizer, "Hello".to_owned());
    let prompt_token_ids = match chat.has_chat() {
        true => chat.encode(&[Message { role: Role::User, content }], tokenizer)?,
        false => chat.encode_text(&content, tokenizer)?,
    };
    let (num_prompt_tokens, max_model_len) = (prompt_token_ids.len(), engine.limits().max_model_len);
    if num_prompt_tokens >= max_model_len {
        return Err(ServeError::NoRoom { num_prompt_tokens, max_model_len });
    }
    let sampling = SamplingParams {
        temperature: 0.0,
        max_tokens: NUM_TOKENS.min(max_model_len - num_prompt_tokens),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    Ok(Request { prompt_token_ids, sampling, ..Request::default() })
}

/// The same prompt again and again, up to [`LONG_PROMPT`] tokens.
fn long(request: &Request, max_model_len: usize) -> Request {
    let num_tokens = LONG_PROMPT.min(max_model_len - 1);
    let prompt_token_ids = request.prompt_token_ids.iter().copied().cycle().take(num_tokens).collect();
    let sampling = SamplingParams { max_tokens: 1, ..request.sampling.clone() };
    Request { prompt_token_ids, sampling, ..request.clone() }
}

async fn generate(mut events: EventReceiver) -> Result<Vec<u32>, SequenceError> {
    let mut token_ids = Vec::new();
    while let Some(event) = events.recv().await {
        match event {
            TokenEvent::Token { token_id } => token_ids.push(token_id),
            TokenEvent::Failed(error) => return Err(error),
            TokenEvent::Admitted { .. } | TokenEvent::Finished { .. } => {}
        }
    }
    Ok(token_ids)
}
