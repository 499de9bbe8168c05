//! Owns the fields of a chat completion request, each with its class: what it means to this server.
//!
//! Invariant: a field that would change the reply and is not honoured is refused by name, never ignored.

pub(super) mod message;
pub(super) mod values;

use sha2::{Digest, Sha256};

use self::message::Messages;
pub(super) use self::message::RequestMessage;
use self::values::{LogitBias, ModelName, StopTokenIds, Stops, TokenCount, TokenLimit};
use crate::error::ApiError;
use crate::fields::shape::Shape;
use crate::fields::{Canonical, Ignored, Refused, fields, parse};
use crate::stream::reply_stream;

fields! {
    /// The body of a chat completion request.
    pub(super) struct ChatCompletionRequest<'a> {
        #[honoured] /// A name that `GET /v1/models` lists. Required.
        pub(super) model: Option<ModelName<'a>>,
        #[honoured] /// The conversation, at least one message. Required.
        pub(super) messages: Messages<'a>,
        #[honoured] /// Most tokens to generate, cut to what the context has room for; -1 is no limit. The smaller
        /// of this and `max_completion_tokens` counts.
        pub(super) max_tokens: TokenLimit,
        #[honoured] /// The newer name of `max_tokens`.
        pub(super) max_completion_tokens: TokenLimit,
        #[honoured] /// No stop token or stop string ends the reply before this many tokens.
        pub(super) min_tokens: Option<TokenCount>,
        #[honoured] /// From 0, which is greedy, to 2. The model's own by default.
        pub(super) temperature: Option<f32>,
        #[honoured] /// `false` is greedy, whatever the temperature; `true` changes nothing.
        pub(super) do_sample: Option<bool>,
        #[honoured] /// Mass of the most probable tokens that are kept, from 0 (only the best one) to 1. The
        /// model's own by default.
        pub(super) top_p: Option<f32>,
        #[honoured] /// How many of the most probable tokens are kept; 0 and -1 keep all. The model's own by
        /// default.
        pub(super) top_k: Option<i64>,
        #[honoured] /// Keeps tokens at least this probable in relation to the best one, from 0 to 1. It is
        /// applied before `top_k` and `top_p`.
        pub(super) min_p: Option<f32>,
        #[honoured] /// From 0.01 to 10; 1 is off. The model's own by default.
        pub(super) repetition_penalty: Option<f32>,
        #[honoured] /// From -2 to 2.
        pub(super) presence_penalty: Option<f32>,
        #[honoured] /// From -2 to 2.
        pub(super) frequency_penalty: Option<f32>,
        #[honoured] /// Token ids with what is added to their logits, from -100 to 100; at most 1024.
        pub(super) logit_bias: LogitBias,
        #[honoured] /// The same seed, body and model give the same reply. Random by default.
        pub(super) seed: Option<i64>,
        #[honoured] /// A string or a list of at most 64, each of at most 1024 bytes. Empty ones count for nothing.
        pub(super) stop: Stops,
        #[honoured] /// At most 128 token ids that end the reply, besides the model's own.
        pub(super) stop_token_ids: StopTokenIds,
        #[honoured] /// Whether stop tokens don't end the reply, as load generators want it.
        pub(super) ignore_eos: bool,

        #[delivery] /// Whether the reply comes as server-sent events.
        pub(super) stream: bool,
        #[delivery] /// See below; needs `stream: true`.
        pub(super) stream_options: Option<StreamOptions>,
        #[delivery] /// From -100 to 100: a lower one is admitted earlier.
        pub(super) priority: i32,

        #[no_effect] /// Names the end user.
        user: Ignored,
        #[no_effect] /// Names the end user.
        user_id: Ignored,
        #[no_effect] /// Names the end user.
        safety_identifier: Ignored,
        #[no_effect] /// Names the request.
        request_id: Ignored,
        #[no_effect] /// Names the request.
        rid: Ignored,
        #[no_effect] /// Labels for the provider's records.
        metadata: Ignored,
        #[no_effect] /// Nothing is stored but the replies of requests with an Idempotency-Key.
        store: Ignored,
        #[no_effect] /// There is one tier.
        service_tier: Ignored,
        #[no_effect] /// Prompts that start alike share their cache by themselves.
        prompt_cache_key: Ignored,
        #[no_effect] /// The prefix cache keeps what it has room for.
        prompt_cache_retention: Ignored,
        #[no_effect] /// Prompts that start alike share their cache by themselves.
        cache_prompt: Ignored,
        #[no_effect] /// Text that the reply is expected to have; it would only make the reply faster.
        prediction: Ignored,
        #[no_effect] /// No reply has tool calls.
        parallel_tool_calls: Ignored,
        #[no_effect] /// No reply has tool calls.
        tool_stream: Ignored,
        #[no_effect] /// No reply has tool calls.
        return_function_call: Ignored,
        #[no_effect] /// These models don't reason before they reply.
        reasoning_effort: Ignored,
        #[no_effect] /// These models don't reason before they reply.
        reasoning: Ignored,
        #[no_effect] /// These models don't reason before they reply.
        reasoning_format: Ignored,
        #[no_effect] /// These models don't reason before they reply.
        include_reasoning: Ignored,
        #[no_effect] /// These models don't reason before they reply.
        separate_reasoning: Ignored,
        #[no_effect] /// These models don't reason before they reply.
        stream_reasoning: Ignored,
        #[no_effect] /// A hint to models that know it.
        verbosity: Ignored,
        #[no_effect] /// Nothing is filtered here.
        sensitive_word_check: Ignored,
        #[no_effect] /// Nothing is marked here.
        watermark_enabled: Ignored,
        #[no_effect] /// Only with `mirostat`.
        mirostat_tau: Ignored,
        #[no_effect] /// Only with `mirostat`.
        mirostat_eta: Ignored,
        #[no_effect] /// Only with `xtc_probability`.
        xtc_threshold: Ignored,
        #[no_effect] /// Only with `dry_multiplier`.
        dry_base: Ignored,
        #[no_effect] /// Only with `dry_multiplier`.
        dry_allowed_length: Ignored,
        #[no_effect] /// Only with `dry_multiplier`.
        dry_sequence_breakers: Ignored,
        #[no_effect] /// Only with `dynatemp_range`.
        dynatemp_exponent: Ignored,
        #[no_effect] /// Only with `repeat_penalty`.
        repeat_last_n: Ignored,

        #[refused(unless Shape::is_one, "only n = 1 is supported")]
        n: Refused,
        #[refused(unless Shape::is_one, "only best_of = 1 is supported")]
        best_of: Refused,
        #[refused(unless Shape::is_false, "beam search is not supported, only false is")]
        use_beam_search: Refused,
        #[refused(unless Shape::is_one, "beam search is not supported, only 1 is")]
        num_beams: Refused,
        #[refused(unless Shape::is_one, "only 1 is supported, which is off")]
        length_penalty: Refused,
        #[refused(unless Shape::is_false, "beam search is not supported, only false is")]
        early_stopping: Refused,
        #[refused(unless Shape::is_false, "log probabilities are not supported, only false is")]
        logprobs: Refused,
        #[refused(unless Shape::is_zero, "log probabilities are not supported, only 0 is")]
        top_logprobs: Refused,
        #[refused(unless Shape::is_false, "log probabilities of the prompt are not supported")]
        prompt_logprobs: Refused,
        #[refused(unless Shape::is_zero, "log probabilities are not supported, only 0 is")]
        n_probs: Refused,
        #[refused(unless Shape::is_empty, "tool calls are not supported, only an empty list is")]
        tools: Refused,
        #[refused(unless is_no_tool, "tool calls are not supported, only none and auto are")]
        tool_choice: Refused,
        #[refused(unless Shape::is_empty, "function calls are not supported, only an empty list is")]
        functions: Refused,
        #[refused(unless is_no_tool, "function calls are not supported, only none and auto are")]
        function_call: Refused,
        #[refused(unless is_text_format, "only {\"type\": \"text\"} is supported")]
        response_format: Refused,
        #[refused(unless Shape::is_empty, "structured outputs are not supported")]
        structured_outputs: Refused,
        #[refused(unless Shape::is_empty, "structured outputs are not supported")]
        guided_json: Refused,
        #[refused(unless Shape::is_empty, "structured outputs are not supported")]
        guided_regex: Refused,
        #[refused(unless Shape::is_empty, "structured outputs are not supported")]
        guided_choice: Refused,
        #[refused(unless Shape::is_empty, "structured outputs are not supported")]
        guided_grammar: Refused,
        #[refused(unless Shape::is_empty, "structured outputs are not supported")]
        grammar: Refused,
        #[refused(unless Shape::is_empty, "structured outputs are not supported")]
        json_schema: Refused,
        #[refused(unless Shape::is_empty, "structured outputs are not supported")]
        regex: Refused,
        #[refused(unless Shape::is_empty, "structured outputs are not supported")]
        ebnf: Refused,
        #[refused(unless is_no_thinking, "the model does not reason, only {\"type\": \"disabled\"} is supported")]
        thinking: Refused,
        #[refused(unless Shape::is_false, "the model does not reason, only false is supported")]
        enable_thinking: Refused,
        #[refused(unless no_kwargs, "only an empty object, or enable_thinking or thinking with false, is supported")]
        chat_template_kwargs: Refused,
        #[refused(unless Shape::is_empty, "the model's own chat format is always used")]
        chat_template: Refused,
        #[refused(unless Shape::is_true, "only true is supported: a reply is always a new message")]
        add_generation_prompt: Refused,
        #[refused(unless Shape::is_false, "only false is supported: a reply is always a new message")]
        continue_final_message: Refused,
        #[refused(unless Shape::is_false, "only false is supported: the chat format has the special tokens")]
        add_special_tokens: Refused,
        #[refused(unless Shape::is_empty, "documents are not supported, put them into a message")]
        documents: Refused,
        #[refused(unless is_text_only, "only [\"text\"] is supported")]
        modalities: Refused,
        #[refused(unless Shape::is_empty, "audio is not supported")]
        audio: Refused,
        #[refused(unless Shape::is_off, "web search is not supported")]
        web_search_options: Refused,
        #[refused(unless Shape::is_off, "web search is not supported")]
        enable_search: Refused,
        #[refused(unless Shape::is_false, "the safe prompt is not supported, only false is")]
        safe_prompt: Refused,
        #[refused(unless Shape::is_empty, "role play is not supported")]
        meta: Refused,
        #[refused(unless Shape::is_empty, "truncation is not supported, shorten the messages")]
        truncate_prompt_tokens: Refused,
        #[refused(unless Shape::is_false, "the prompt is never part of the reply, only false is supported")]
        echo: Refused,
        #[refused(unless Shape::is_false, "the stop string is never part of the reply, only false is supported")]
        include_stop_str_in_output: Refused,
        #[refused(unless Shape::is_false, "the stop string is never part of the reply, only false is supported")]
        no_stop_trim: Refused,
        #[refused(unless Shape::is_empty, "only stop strings are supported, see stop")]
        stop_regex: Refused,
        #[refused(unless Shape::is_true, "special tokens are never part of the text, only true is supported")]
        skip_special_tokens: Refused,
        #[refused(unless Shape::is_true, "only true is supported")]
        spaces_between_special_tokens: Refused,
        #[refused(unless Shape::is_false, "token ids are not returned, only false is supported")]
        return_token_ids: Refused,
        #[refused(unless Shape::is_false, "token ids are not returned, only false is supported")]
        return_tokens_as_token_ids: Refused,
        #[refused(unless Shape::is_empty, "bad words are not supported, see logit_bias")]
        bad_words: Refused,
        #[refused(unless Shape::is_empty, "only logit_bias is supported")]
        allowed_token_ids: Refused,
        #[refused(unless Shape::is_empty, "only logit_bias is supported")]
        logits_processors: Refused,
        #[refused(unless Shape::is_empty, "a salt for each API key is the server's own option")]
        cache_salt: Refused,
        #[refused(unless Shape::is_empty, "adapters are merged at export")]
        lora_path: Refused,
        #[refused(unless Shape::is_one, "only 1 is supported, which is off")]
        typical_p: Refused,
        #[refused(unless Shape::is_one, "only 1 is supported, which is off")]
        typical: Refused,
        #[refused(unless Shape::is_one, "only 1 is supported, which is off")]
        tfs_z: Refused,
        #[refused(unless Shape::is_zero, "only 0 is supported, which is off")]
        mirostat: Refused,
        #[refused(unless Shape::is_zero, "only 0 is supported, which is off")]
        top_a: Refused,
        #[refused(unless Shape::is_zero, "only 0 is supported, which is off")]
        epsilon_cutoff: Refused,
        #[refused(unless Shape::is_zero, "only 0 is supported, which is off")]
        eta_cutoff: Refused,
        #[refused(unless Shape::is_zero, "only 0 is supported, which is off")]
        no_repeat_ngram_size: Refused,
        #[refused(unless Shape::is_zero, "only 0 is supported, which is off")]
        xtc_probability: Refused,
        #[refused(unless Shape::is_zero, "only 0 is supported, which is off")]
        dry_multiplier: Refused,
        #[refused(unless Shape::is_zero, "only 0 is supported, which is off")]
        dynatemp_range: Refused,
        #[refused(unless Shape::is_one, "only 1 is supported, see repetition_penalty")]
        repeat_penalty: Refused,
    }
}

fields! {
    /// Options of a streamed answer.
    #[derive(Clone, Copy)]
    pub(super) struct StreamOptions {
        #[delivery] /// One more chunk, with the usage.
        include_usage: bool,
        #[delivery] /// The usage so far in every chunk, if `include_usage` is true.
        continuous_usage_stats: bool,
        #[delivery] /// Comments in long silences, on by default; off for clients that parse every line as JSON.
        heartbeat: Option<bool>,
        #[no_effect] /// Chunks are never padded.
        include_obfuscation: Ignored,
    }
}

impl<'a> ChatCompletionRequest<'a> {
    /// Reads a body.
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        parse(body)
    }

    /// Whether two bodies ask for the same reply: the hash of what changes it. It does not depend on the order of
    /// fields, on white space, on how a number is written or on how the reply is delivered.
    pub(super) fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        self.feed(&mut hasher);
        hasher.finalize().into()
    }
}

impl From<StreamOptions> for reply_stream::StreamOptions {
    fn from(options: StreamOptions) -> Self {
        Self {
            include_usage: options.include_usage,
            continuous_usage_stats: options.continuous_usage_stats,
            heartbeat: options.heartbeat.unwrap_or(true),
        }
    }
}

fn is_no_tool(value: &Shape) -> bool {
    value.is_one_of(&["none", "auto", ""])
}

fn is_text_format(value: &Shape) -> bool {
    value.has_type("text")
}

fn is_text_only(value: &Shape) -> bool {
    value.is_list_of("text")
}

fn is_no_thinking(value: &Shape) -> bool {
    value.is_off() || value.has_type("disabled") || value.has_type("auto")
}

fn no_kwargs(value: &Shape) -> bool {
    value.is_empty() || value.has_off(&["enable_thinking", "thinking"])
}

#[cfg(test)]
mod tests;
