//! Owns the choice of the next token from a row of logits.
//!
//! Invariant: the choice depends on the row, the sequence and its seed only. The generator has no
//! state: a draw is keyed by seed, position and purpose, so neither batching nor preemption can
//! change it.

mod candidates;
mod passes;

use crate::error::SequenceError;
use crate::sampling_params::SamplingParams;
use crate::sequence::Sequence;
use passes::{CHUNK, Chunk, best, weigh};

/// What a draw is for; part of its key.
#[derive(Debug, Clone, Copy)]
#[repr(u64)]
enum Purpose {
    NextToken = 1,
}

/// Chooses tokens. Holds buffers only.
#[derive(Debug)]
pub struct Sampler {
    vocab_size: usize,
    /// Logits after penalties and bias, where a sequence has any.
    logits: Vec<f32>,
    weights: Vec<f32>,
    chunks: Vec<Chunk>,
    candidates: Vec<(f32, u32)>,
    maxima: Vec<f32>,
}

impl Sampler {
    /// For rows whose first `vocab_size` values are real tokens; the rest is padding.
    pub fn new(vocab_size: usize) -> Self {
        Self {
            vocab_size,
            logits: Vec::with_capacity(vocab_size),
            weights: Vec::with_capacity(vocab_size),
            chunks: Vec::with_capacity(vocab_size / CHUNK + 1),
            candidates: Vec::with_capacity(vocab_size),
            maxima: Vec::with_capacity(vocab_size / CHUNK + 1),
        }
    }

    /// The next token of `sequence`, whose last token produced `row`.
    ///
    /// # Errors
    /// [`SequenceError::NonFiniteLogits`] if the row is unusable, [`SequenceError::Run`] if it is too short,
    /// [`SequenceError::CannotSample`] if the sequence's own options leave nothing to choose from.
    pub fn sample(&mut self, row: &[f32], sequence: &Sequence) -> Result<u32, SequenceError> {
        let position = sequence.tokens().len() - 1;
        let Some(row) = row.get(..self.vocab_size) else {
            let (found, wanted) = (row.len(), self.vocab_size);
            return Err(SequenceError::Run(format!("a row has {found} logits, and {wanted} are wanted")));
        };
        let mut found = best(row);
        if !found.is_finite {
            return Err(SequenceError::NonFiniteLogits { position });
        }
        let params = &sequence.sampling;
        let mut logits = row;
        if !sequence.takes_plain_logits() {
            self.logits.clear();
            self.logits.extend_from_slice(row);
            adjust(&mut self.logits, sequence)?;
            // A ban is an infinity, so only the row itself is asked whether it is finite.
            found = best(&self.logits);
            if found.value == f32::NEG_INFINITY {
                return Err(SequenceError::CannotSample("every token is banned"));
            }
            logits = &self.logits;
        }
        if params.temperature == 0.0 {
            return Ok(found.id);
        }
        weigh(logits, found.value, scale(params.temperature), &mut self.weights, &mut self.chunks);
        let uniform = uniform(params.seed, position as u64, Purpose::NextToken);
        Ok(self.draw(params, uniform))
    }

    /// Draws from `self.weights`, of which the best is 1: min-p, then top-k, then the nucleus of what is left.
    fn draw(&mut self, params: &SamplingParams, uniform: f64) -> u32 {
        let SamplingParams { top_p, min_p, .. } = *params;
        let top_k = params.top_k as usize;
        let mut total: f64 = self.chunks.iter().map(|chunk| chunk.sum).sum();
        let num_weights = self.weights.len();
        self.candidates.clear();
        // Heaviest first; equal weights in the order of their ids, so that the result is defined.
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if (1..num_weights).contains(&top_k) {
            // At least top_k weights reach the top_k-th largest of these maxima, so the rest is out.
            self.maxima.clear();
            self.maxima.extend(self.chunks.iter().map(|chunk| chunk.max));
            let bound = match self.maxima.len() {
                len if len > top_k => *self.maxima.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a)).1,
                _ => 0.0,
            };
            self.gather(bound.max(min_p));
            if self.candidates.len() > top_k {
                self.candidates.select_nth_unstable_by(top_k - 1, order);
                self.candidates.truncate(top_k);
            }
            self.candidates.sort_unstable_by(order);
            total = self.candidates.iter().map(|&(weight, _)| f64::from(weight)).sum();
        } else if min_p > 0.0 {
            self.gather(min_p);
            self.candidates.sort_unstable_by(order);
            total = self.candidates.iter().map(|&(weight, _)| f64::from(weight)).sum();
        } else if top_p < 1.0 {
            // Everything lighter than this weighs less than 1 - top_p together, so the nucleus is
            // among the rest: a few hundred candidates to sort instead of the vocabulary.
            let bound = ((1.0 - f64::from(top_p)) * total / num_weights as f64) as f32;
            self.gather(bound);
            self.candidates.sort_unstable_by(order);
        } else {
            return self.pick_any(uniform * total);
        }
        if top_p < 1.0 {
            let mass = f64::from(top_p) * total;
            let mut sum = 0.0;
            let mut inside = |&(weight, _): &(f32, u32)| {
                let is_inside = sum < mass;
                sum += f64::from(weight);
                is_inside
            };
            let num_inside = self.candidates.iter().take_while(|c| inside(c)).count();
            self.candidates.truncate(num_inside.max(1));
            total = self.candidates.iter().map(|&(weight, _)| f64::from(weight)).sum();
        }
        pick(self.candidates.iter().copied(), uniform * total)
    }

    /// Makes candidates of all weights from `bound` on.
    fn gather(&mut self, bound: f32) {
        let Self { weights, chunks, candidates, .. } = self;
        for (index, _) in chunks.iter().enumerate().filter(|(_, chunk)| chunk.max >= bound) {
            candidates.extend(in_chunk(weights, index).filter(|&(weight, _)| weight >= bound));
        }
    }

    /// Like [`pick`] from all weights, past whole chunks at once.
    fn pick_any(&self, target: f64) -> u32 {
        let (mut chosen, mut before, mut sum) = (0, 0.0, 0.0);
        for (index, chunk) in self.chunks.iter().enumerate().filter(|(_, chunk)| chunk.sum > 0.0) {
            (chosen, before) = (index, sum);
            sum += chunk.sum;
            if sum > target {
                break;
            }
        }
        pick(in_chunk(&self.weights, chosen), target - before)
    }
}

/// The weights of the chunk at `index`, with their ids.
fn in_chunk(weights: &[f32], index: usize) -> impl Iterator<Item = (f32, u32)> {
    let start = index * CHUNK;
    let end = weights.len().min(start + CHUNK);
    weights[start..end].iter().copied().zip(start as u32..)
}

/// What differences of logits are multiplied with; finite even for the smallest temperature.
fn scale(temperature: f32) -> f32 {
    temperature.recip().min(f32::MAX)
}

/// The candidate at which the running sum of weights passes `target`.
fn pick(candidates: impl Iterator<Item = (f32, u32)>, target: f64) -> u32 {
    let mut sum = 0.0;
    let mut last = 0;
    for (weight, id) in candidates {
        if weight > 0.0 {
            sum += f64::from(weight);
            last = id;
            if sum > target {
                break;
            }
        }
    }
    last
}

/// Applies penalties, bias and the ban on early stop ids.
fn adjust(logits: &mut [f32], sequence: &Sequence) -> Result<(), SequenceError> {
    const UNKNOWN: SequenceError =
        SequenceError::CannotSample("the request names a token that the model does not have");
    let params = &sequence.sampling;
    for (id, count) in sequence.output_counts() {
        let logit = logits.get_mut(id as usize).ok_or(UNKNOWN)?;
        let penalty = params.repetition_penalty;
        let penalized = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        // A huge logit must not become infinite: the difference of two infinities is no number.
        *logit = penalized.clamp(-1e30, 1e30);
        if count > 0 {
            *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
        }
    }
    for &(id, bias) in &params.logit_bias {
        *logits.get_mut(id as usize).ok_or(UNKNOWN)? += bias;
    }
    if sequence.output().len() < params.min_tokens {
        for &id in &params.stop_token_ids {
            *logits.get_mut(id as usize).ok_or(UNKNOWN)? = f32::NEG_INFINITY;
        }
    }
    Ok(())
}

/// A number in [0, 1) from its key (SplitMix64's finaliser, applied to each part in turn).
fn uniform(seed: u64, position: u64, purpose: Purpose) -> f64 {
    let mix = |value: u64| {
        let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    };
    let golden = 0x9e37_79b9_7f4a_7c15_u64;
    let key = mix(seed.wrapping_add(golden));
    let key = mix(key ^ position.wrapping_mul(golden));
    let key = mix(key ^ (purpose as u64).wrapping_mul(golden).rotate_left(32));
    (key >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
