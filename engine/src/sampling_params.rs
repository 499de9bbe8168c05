//! Owns the sampling options of a request and their ranges.

use crate::error::SubmitError;

/// Most tokens that a request may bias: they are applied for every token it generates.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Most stop ids of a request, the model's own included: each token is compared with all of them.
pub(crate) const MAX_STOP_TOKEN_IDS: usize = 1024;

/// How the tokens of one request are chosen. Field names are the OpenAI or vLLM ones.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; at most 2.
    pub temperature: f32,
    /// 0 keeps all candidates.
    pub top_k: u32,
    /// Mass of the nucleus, from 0 to 1; 0 keeps the best token only.
    pub top_p: f32,
    /// Tokens less probable than this part of the best one's probability are left out, before `top_k` and
    /// `top_p` count; from 0, which keeps all, to 1.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output, from 0.01 to 10;
    /// 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of tokens in the output; from -2 to 2.
    pub presence_penalty: f32,
    /// Subtracted from logits for each occurrence in the output; from -2 to 2.
    pub frequency_penalty: f32,
    /// Added to the logits of these ids; from -100 to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// Keys the random draws, together with position and purpose.
    pub seed: u64,
    /// Most tokens to generate; at least 1.
    pub max_tokens: usize,
    /// Stop ids are not sampled before this many tokens; who looks for stop strings leaves those out, too.
    pub min_tokens: usize,
    /// Stop ids don't end the sequence.
    pub ignore_eos: bool,
    /// Ids that end the sequence; the id itself is not part of the output.
    pub stop_token_ids: Vec<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            max_tokens: 16,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
        }
    }
}

impl SamplingParams {
    /// Fewest tokens of the reply, unless it is aborted.
    pub(crate) fn fewest_tokens(&self) -> usize {
        if self.ignore_eos { self.max_tokens } else { self.min_tokens }
    }

    /// Whether the tokens seen so far change the logits.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Checks every range; `vocab_size` bounds the ids.
    ///
    /// # Errors
    /// [`SubmitError::InvalidParameter`] names the first field out of range.
    pub fn validate(&self, vocab_size: usize) -> Result<(), SubmitError> {
        let range = |field, value: f32, low: f32, high: f32| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            invalid(field, format!("must be between {low} and {high}, not {value}"))
        };
        range("temperature", self.temperature, 0.0, 2.0)?;
        range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        range("top_p", self.top_p, 0.0, 1.0)?;
        range("min_p", self.min_p, 0.0, 1.0)?;
        // Smaller ones could make a finite logit infinite.
        range("repetition_penalty", self.repetition_penalty, 0.01, 10.0)?;
        if self.logit_bias.len() > MAX_LOGIT_BIAS {
            return invalid("logit_bias", format!("has more than {MAX_LOGIT_BIAS} tokens"));
        }
        for (id, bias) in &self.logit_bias {
            if *id as usize >= vocab_size {
                return invalid("logit_bias", format!("token id {id} is not below {vocab_size}"));
            }
            if !(-100.0..=100.0).contains(bias) {
                let message = format!("of token {id} must be from -100 to 100, not {bias}");
                return invalid("logit_bias", message);
            }
        }
        if self.stop_token_ids.len() > MAX_STOP_TOKEN_IDS {
            return invalid("stop_token_ids", format!("has more than {MAX_STOP_TOKEN_IDS} tokens"));
        }
        if let Some(id) = self.stop_token_ids.iter().find(|&&id| id as usize >= vocab_size) {
            return invalid("stop_token_ids", format!("token id {id} is not below {vocab_size}"));
        }
        if self.min_tokens > 0 && self.stops_everywhere(vocab_size) {
            let message = "names every token, so with min_tokens none could be generated";
            return invalid("stop_token_ids", message.into());
        }
        if self.max_tokens == 0 {
            return invalid("max_tokens", "must be at least 1".into());
        }
        if self.min_tokens > self.max_tokens {
            let message = format!("must not be above max_tokens ({})", self.max_tokens);
            return invalid("min_tokens", message);
        }
        Ok(())
    }

    /// Whether every token of the vocabulary is a stop id.
    fn stops_everywhere(&self, vocab_size: usize) -> bool {
        // Mostly there are far fewer.
        self.stop_token_ids.len() >= vocab_size
            && (0..vocab_size).all(|id| self.stop_token_ids.iter().any(|&stop| stop as usize == id))
    }
}

fn invalid(field: &'static str, message: String) -> Result<(), SubmitError> {
    Err(SubmitError::InvalidParameter { field, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_out_of_range_is_named() {
        let ok = SamplingParams::default();
        assert_eq!(ok.validate(100), Ok(()));
        let cases = [
            (SamplingParams { temperature: f32::NAN, ..ok.clone() }, "temperature"),
            (SamplingParams { temperature: 2.1, ..ok.clone() }, "temperature"),
            (SamplingParams { top_p: -0.1, ..ok.clone() }, "top_p"),
            (SamplingParams { top_p: 1.1, ..ok.clone() }, "top_p"),
            (SamplingParams { min_p: f32::NAN, ..ok.clone() }, "min_p"),
            (SamplingParams { min_p: 1.1, ..ok.clone() }, "min_p"),
            (SamplingParams { repetition_penalty: 0.0, ..ok.clone() }, "repetition_penalty"),
            (SamplingParams { logit_bias: vec![(100, 1.0)], ..ok.clone() }, "logit_bias"),
            (SamplingParams { logit_bias: vec![(1, 101.0)], ..ok.clone() }, "logit_bias"),
            (SamplingParams { logit_bias: vec![(1, 1.0); 1025], ..ok.clone() }, "logit_bias"),
            (SamplingParams { logit_bias: vec![(1, f32::NAN)], ..ok.clone() }, "logit_bias"),
            (SamplingParams { logit_bias: vec![(1, f32::NEG_INFINITY)], ..ok.clone() }, "logit_bias"),
            (SamplingParams { stop_token_ids: vec![1, 100], ..ok.clone() }, "stop_token_ids"),
            (SamplingParams { stop_token_ids: vec![1; 1025], ..ok.clone() }, "stop_token_ids"),
            (
                SamplingParams { stop_token_ids: (0..100).collect(), min_tokens: 1, ..ok.clone() },
                "stop_token_ids",
            ),
            (SamplingParams { max_tokens: 0, ..ok.clone() }, "max_tokens"),
            (SamplingParams { min_tokens: 17, ..ok.clone() }, "min_tokens"),
        ];
        for (params, expected) in cases {
            match params.validate(100) {
                Err(SubmitError::InvalidParameter { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
        for params in [
            SamplingParams { stop_token_ids: (0..100).collect(), ..ok.clone() },
            SamplingParams { stop_token_ids: (1..100).chain(1..100).collect(), min_tokens: 1, ..ok },
        ] {
            assert_eq!(params.validate(100), Ok(()));
        }
    }
}
