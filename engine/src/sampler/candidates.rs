//! Owns the choice of the next token from the best candidates of a row, where they are enough.
//!
//! Invariant: whatever is chosen here, the whole row would have chosen too; where that is not certain
//! there is no choice, and the caller fetches the row.

use super::passes::exp;
use super::{Purpose, Sampler, pick, scale, uniform};
use crate::error::SequenceError;
use crate::sequence::Sequence;
use crate::step::CandidateRow;

impl Sampler {
    /// The next token of `sequence`, or `None` if the whole row is needed.
    ///
    /// # Errors
    /// [`SequenceError::NonFiniteLogits`] if the row is unusable, [`SequenceError::Run`] if it names tokens that
    /// the model does not have.
    pub fn sample_candidates(
        &mut self,
        row: CandidateRow<'_>,
        sequence: &Sequence,
    ) -> Option<Result<u32, SequenceError>> {
        let position = sequence.tokens().len() - 1;
        let params = &sequence.sampling;
        if !sequence.takes_plain_logits() {
            return None;
        }
        // A sum over the row: it is no number if any of them is not.
        if !row.logsumexp.is_finite() || row.values.iter().any(|value| !value.is_finite()) {
            return Some(Err(SequenceError::NonFiniteLogits { position }));
        }
        let is_token = |&id: &i32| usize::try_from(id).is_ok_and(|id| id < self.vocab_size);
        if let Some(id) = row.ids.iter().find(|id| !is_token(id)) {
            let message = format!("the graph names candidate {id} of {} tokens", self.vocab_size);
            return Some(Err(SequenceError::Run(message)));
        }
        // All that follows counts on the order.
        if !row.values.is_sorted_by(|a, b| a >= b) || row.values.len() > self.vocab_size {
            return None;
        }
        let (&best, &least) = (row.values.first()?, row.values.last()?);
        // Equal values go by id, and one that is not here may have a lower id than one that is.
        let is_certain = |value: f32| value > least;
        if params.temperature == 0.0 {
            let equal = row.values.iter().zip(row.ids).take_while(|(value, _)| **value == best);
            return is_certain(best).then(|| Ok(equal.map(|(_, &id)| id as u32).min().unwrap_or(0)));
        }
        let scale = scale(params.temperature);
        let weigh = |value: f32| exp((value - best) * scale);
        self.candidates.clear();
        self.candidates.extend(row.values.iter().zip(row.ids).map(|(&value, &id)| (weigh(value), id as u32)));
        self.candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let weight_of = |candidates: &[(f32, u32)]| candidates.iter().map(|c| f64::from(c.0)).sum::<f64>();
        // Where the least candidate is out by min-p, everything that is no candidate is out, too. The
        // exponential rounds, so a weight just below the bound is no proof.
        let least_weight = self.candidates.last()?.0;
        let has_all_likely = least_weight < params.min_p * (1.0 - 1e-5);
        let num_likely = self.candidates.iter().take_while(|candidate| candidate.0 >= params.min_p).count();
        self.candidates.truncate(num_likely);
        let (low, high) = match params.top_k as usize {
            top_k if has_all_likely => {
                if top_k > 0 {
                    self.candidates.truncate(top_k);
                }
                let total = weight_of(&self.candidates);
                (total, total)
            }
            top_k if (1..self.vocab_size).contains(&top_k) => {
                if !is_certain(*row.values.get(top_k - 1)?) {
                    return None;
                }
                self.candidates.truncate(top_k);
                let total = weight_of(&self.candidates);
                (total, total)
            }
            // All tokens are candidates, or all that min-p leaves, and each has its part in the draw.
            _ if params.top_p >= 1.0 || params.min_p > 0.0 => return None,
            _ => {
                let here = weight_of(&self.candidates);
                let (low, high) = self.tail_weight(&row, params.temperature);
                (here + low, here + high)
            }
        };
        if params.top_p < 1.0 {
            let (fewest, most) = (self.num_inside(params.top_p, low), self.num_inside(params.top_p, high));
            let is_whole = fewest == self.candidates.len() && low == high;
            if fewest != most || !(is_whole || is_certain(row.values[most - 1])) {
                return None;
            }
            self.candidates.truncate(most);
        }
        let total = weight_of(&self.candidates);
        let uniform = uniform(params.seed, position as u64, Purpose::NextToken);
        Some(Ok(pick(self.candidates.iter().copied(), uniform * total)))
    }

    /// Bounds of what all tokens that are no candidates weigh together, in units of the best one.
    fn tail_weight(&self, row: &CandidateRow<'_>, temperature: f32) -> (f64, f64) {
        let (best, least) = (f64::from(row.values[0]), f64::from(row.values[row.values.len() - 1]));
        let at_one = |value: f32| (f64::from(value) - best).exp();
        let all = (f64::from(row.logsumexp) - best).exp();
        // Room for the rounding of a float32 logarithm and of sums on a GPU.
        let slack = 1e-5 * all;
        let tail = all - row.values.iter().map(|&value| at_one(value)).sum::<f64>();
        // Each weight is its weight at temperature 1 times exp((1/t - 1) (value - best)), and none of
        // the tail is above `least`: below temperature 1 that factor is largest there, above it smallest.
        let power = 1.0 / f64::from(temperature) - 1.0;
        let factor = (power * (least - best)).exp();
        let num_others = (self.vocab_size - row.values.len()) as f64;
        let most = num_others * ((least - best) / f64::from(temperature)).exp();
        match temperature <= 1.0 {
            true => (0.0, (factor * (tail + slack)).clamp(0.0, most)),
            false => ((factor * (tail - slack)).clamp(0.0, most), most),
        }
    }

    /// How many candidates, heaviest first, make up `top_p` of `total`.
    fn num_inside(&self, top_p: f32, total: f64) -> usize {
        let mass = f64::from(top_p) * total;
        let mut sum = 0.0;
        let inside = self.candidates.iter().take_while(|candidate| {
            let is_inside = sum < mass;
            sum += f64::from(candidate.0);
            is_inside
        });
        inside.count().max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{Request, RequestId};
    use crate::sampling_params::SamplingParams;
    use std::time::Duration;

    const K: usize = 16;

    fn sequence(sampling: SamplingParams) -> Sequence {
        let request = Request { prompt_token_ids: vec![0], sampling, ..Request::default() };
        Sequence::new(RequestId(1), request, Duration::ZERO)
    }

    /// What the graph makes of a row; values of half precision have many equals.
    fn candidates(row: &[f32]) -> (Vec<i32>, Vec<f32>, f32) {
        let mut ids: Vec<i32> = (0..row.len() as i32).collect();
        ids.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(b.cmp(&a)));
        ids.truncate(K);
        let values: Vec<f32> = ids.iter().map(|&id| row[id as usize]).collect();
        let total: f64 = row.iter().map(|&value| f64::from(value - values[0]).exp()).sum();
        (ids, values.clone(), total.ln() as f32 + values[0])
    }

    /// A row with a few good tokens and a long tail, on a grid so coarse that ties are common.
    fn row(seed: u64, spread: f32) -> Vec<f32> {
        let noise = |id: u64| uniform(seed, id, Purpose::NextToken) as f32;
        (0..400).map(|id| ((noise(id).powi(8) * spread - noise(id + 1000)) * 64.0).round() / 64.0).collect()
    }

    #[test]
    fn what_is_chosen_is_what_the_row_would_choose() {
        let mut sampler = Sampler::new(400);
        let (mut num_chosen, mut num_asked) = (0, 0);
        for seed in 0..2000u64 {
            for (temperature, top_k, top_p, min_p) in [
                (0.0, 0, 1.0, 0.0),
                (0.8, 0, 0.8, 0.0),
                (1.0, 0, 0.5, 0.0),
                (1.3, 0, 0.6, 0.0),
                (0.7, 5, 1.0, 0.0),
                (1.0, 16, 0.9, 0.0),
                (1.0, 0, 1.0, 0.1),
                (1.0, 0, 0.9, 0.05),
                (0.7, 3, 0.9, 0.3),
                (1.3, 16, 1.0, 0.001),
                (1.0, 100, 0.0, 0.2),
            ] {
                let params = SamplingParams { temperature, top_k, top_p, min_p, seed, ..Default::default() };
                let sequence = sequence(params);
                let row = row(seed, [4.0, 12.0, 24.0][seed as usize % 3]);
                let (ids, values, logsumexp) = candidates(&row);
                let given = CandidateRow { ids: &ids, values: &values, logsumexp };
                num_asked += 1;
                if let Some(found) = sampler.sample_candidates(given, &sequence) {
                    num_chosen += 1;
                    assert_eq!(found, sampler.sample(&row, &sequence), "{:?}", sequence.sampling);
                }
            }
        }
        assert!(num_chosen > num_asked / 2, "{num_chosen} of {num_asked}");
    }

    #[test]
    fn what_changes_logits_needs_the_row() {
        let mut sampler = Sampler::new(400);
        let row = row(3, 24.0);
        let (ids, values, logsumexp) = candidates(&row);
        let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
        for params in [
            SamplingParams { repetition_penalty: 1.1, ..greedy.clone() },
            SamplingParams { logit_bias: vec![(1, 1.0)], ..greedy.clone() },
            SamplingParams { min_tokens: 2, stop_token_ids: vec![1], ..greedy.clone() },
            SamplingParams { temperature: 1.0, ..greedy.clone() },
            SamplingParams { temperature: 1.0, min_p: 1e-9, ..greedy.clone() },
            SamplingParams { temperature: 1.0, top_k: 17, ..greedy },
        ] {
            let given = CandidateRow { ids: &ids, values: &values, logsumexp };
            assert_eq!(sampler.sample_candidates(given, &sequence(params.clone())), None, "{params:?}");
        }
    }

    #[test]
    fn rows_that_are_no_numbers_are_an_error() {
        let mut sampler = Sampler::new(3);
        let sequence = sequence(SamplingParams { temperature: 0.0, ..Default::default() });
        for (value, logsumexp) in [(f32::NAN, 1.0), (f32::INFINITY, 1.0), (1.0, f32::NAN)] {
            let given = CandidateRow { ids: &[0, 1], values: &[value, 0.0], logsumexp };
            let expected = Err(SequenceError::NonFiniteLogits { position: 0 });
            assert_eq!(sampler.sample_candidates(given, &sequence), Some(expected));
        }
    }

    #[test]
    fn candidates_that_no_graph_should_name_end_their_sequence_or_need_the_row() {
        let mut sampler = Sampler::new(3);
        let sampling = SamplingParams { top_p: 0.5, ..Default::default() };
        for id in [-1, 3, i32::MIN, i32::MAX] {
            let given = CandidateRow { ids: &[0, id], values: &[1.0, 0.0], logsumexp: 1.5 };
            let found = sampler.sample_candidates(given, &sequence(sampling.clone()));
            assert!(matches!(found, Some(Err(SequenceError::Run(_)))), "{found:?}");
        }
        let unordered = CandidateRow { ids: &[0, 1, 2], values: &[0.0, 500.0, 1.0], logsumexp: 500.0 };
        assert_eq!(sampler.sample_candidates(unordered, &sequence(sampling.clone())), None);
        let too_many = CandidateRow { ids: &[0, 1, 2, 0], values: &[1.0; 4], logsumexp: 2.0 };
        assert_eq!(sampler.sample_candidates(too_many, &sequence(sampling)), None);
    }
}
