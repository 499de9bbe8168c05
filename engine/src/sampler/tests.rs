use super::*;
use crate::request::{Request, RequestId};
use counting_allocator::num_allocations;
use std::time::Duration;

fn sequence(prompt: &[u32], output: &[u32], sampling: SamplingParams) -> Sequence {
    let request = Request { prompt_token_ids: prompt.to_vec(), sampling, ..Request::default() };
    let mut sequence = Sequence::new(RequestId(1), request, Duration::ZERO);
    output.iter().for_each(|&id| sequence.push(id));
    sequence
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..Default::default() }
}

#[test]
fn greedy_takes_the_first_largest_and_never_padding() {
    let mut sampler = Sampler::new(4);
    let row = [0.0, 3.0, 3.0, -1.0, 99.0];
    assert_eq!(sampler.sample(&row, &sequence(&[0], &[], greedy())), Ok(1));
}

#[test]
fn a_draw_allocates_nothing() {
    let row: Vec<f32> = (0..5000).map(|id| (id % 97) as f32 / 7.0).collect();
    let mut sampler = Sampler::new(row.len());
    let wild = SamplingParams {
        top_k: 50,
        top_p: 0.9,
        repetition_penalty: 1.1,
        presence_penalty: 0.5,
        logit_bias: vec![(3, 1.0)],
        ..Default::default()
    };
    let with_min_p = SamplingParams { min_p: 0.01, ..Default::default() };
    for sampling in [greedy(), SamplingParams::default(), wild, with_min_p] {
        let sequence = sequence(&[1, 2], &[3, 4, 3], sampling);
        sampler.sample(&row, &sequence).unwrap();
        let count = num_allocations(|| sampler.sample(&row, &sequence));
        assert_eq!(count, 0, "{:?}", sequence.sampling);
    }
}

#[test]
fn non_finite_rows_are_an_error() {
    let mut sampler = Sampler::new(3);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let result = sampler.sample(&[0.0, bad, 1.0], &sequence(&[0, 0], &[], greedy()));
        assert_eq!(result, Err(SequenceError::NonFiniteLogits { position: 1 }));
    }
    assert!(sampler.sample(&[3e38, 3e38, 3e38], &sequence(&[0], &[], greedy())).is_ok());
}

#[test]
fn penalties_and_bias_move_the_greedy_choice() {
    let mut sampler = Sampler::new(3);
    let row = [1.0, 0.9, -1.0];
    let cases = [
        (SamplingParams { repetition_penalty: 2.0, ..greedy() }, &[0][..], &[][..], 1),
        (SamplingParams { presence_penalty: 0.2, ..greedy() }, &[2], &[0], 1),
        (SamplingParams { frequency_penalty: 0.06, ..greedy() }, &[2], &[0, 0], 1),
        (SamplingParams { frequency_penalty: 0.06, ..greedy() }, &[0, 0], &[2], 0),
        (SamplingParams { logit_bias: vec![(2, 5.0)], ..greedy() }, &[0], &[], 2),
        (SamplingParams { min_tokens: 2, stop_token_ids: vec![0], ..greedy() }, &[0], &[1], 1),
        (SamplingParams { min_tokens: 1, stop_token_ids: vec![0], ..greedy() }, &[0], &[1], 0),
    ];
    for (params, prompt, output, expected) in cases {
        let label = format!("{params:?}");
        assert_eq!(sampler.sample(&row, &sequence(prompt, output, params)), Ok(expected), "{label}");
    }
}

/// Admission control refuses these; if one came through, it must not fail the others.
#[test]
fn options_that_no_vocabulary_fits_are_an_error_of_their_sequence() {
    let mut sampler = Sampler::new(3);
    let ban =
        |top_k| SamplingParams { min_tokens: 9, stop_token_ids: vec![0, 1, 2], top_k, ..Default::default() };
    for sampling in [
        ban(0),
        ban(2),
        SamplingParams { top_p: 0.5, ..ban(0) },
        SamplingParams { temperature: 0.0, ..ban(0) },
        SamplingParams { stop_token_ids: vec![3], min_tokens: 9, ..Default::default() },
        SamplingParams { logit_bias: vec![(u32::MAX, 1.0)], ..Default::default() },
        SamplingParams { repetition_penalty: 1.1, ..Default::default() },
    ] {
        // The prompt's second token is unknown, which only a penalty has to look at.
        let sequence = sequence(&[0, 3], &[], sampling);
        let found = sampler.sample(&[1.0, 2.0, 3.0], &sequence);
        assert!(matches!(found, Err(SequenceError::CannotSample(_))), "{found:?}");
    }
    let short = sampler.sample(&[1.0, 2.0], &sequence(&[0], &[], greedy()));
    assert!(matches!(short, Err(SequenceError::Run(_))), "{short:?}");
}

/// Frequencies over many seeds against the distribution computed from the definition.
#[test]
fn draws_follow_the_distribution() {
    let row: Vec<f32> = (0..500).map(|i| ((i * 37 % 50) as f32) / 10.0 - (i / 50) as f32).collect();
    let mut sampler = Sampler::new(500);
    for (temperature, top_k, top_p, min_p) in [
        (1.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.0, 0, 0.6, 0.0),
        (1.3, 20, 0.8, 0.0),
        (1.0, 0, 1.0, 0.3),
        (1.3, 0, 0.8, 0.2),
        (1.0, 4, 1.0, 0.5),
        (1.5, 100, 0.9, 0.5),
        (1.0, 0, 1.0, 1.0),
        (1.0, 0, 0.0, 0.0),
    ] {
        let expected = reference(&row, temperature, top_k, top_p, min_p);
        let num_draws = 40_000;
        let mut counts = vec![0usize; 500];
        for seed in 0..num_draws {
            let params = SamplingParams {
                temperature: temperature as f32,
                top_k: top_k as u32,
                top_p: top_p as f32,
                min_p: min_p as f32,
                seed,
                ..Default::default()
            };
            counts[sampler.sample(&row, &sequence(&[0], &[], params)).unwrap() as usize] += 1;
        }
        for (id, (&count, &p)) in counts.iter().zip(&expected).enumerate() {
            let found = count as f64 / num_draws as f64;
            // Five standard deviations of a binomial count, and a few for rare ids; nothing at
            // all outside the support.
            let rare = if p > 0.0 { 4.0 / num_draws as f64 } else { 0.0 };
            let tolerance = 5.0 * (p * (1.0 - p) / num_draws as f64).sqrt() + rare;
            assert!(
                (found - p).abs() <= tolerance,
                "t {temperature} k {top_k} p {top_p} min {min_p}: id {id} {found} against {p}"
            );
        }
    }
}

fn reference(row: &[f32], temperature: f64, top_k: usize, top_p: f64, min_p: f64) -> Vec<f64> {
    let mut weights: Vec<(f64, usize)> =
        row.iter().enumerate().map(|(id, &x)| ((f64::from(x) / temperature).exp(), id)).collect();
    weights.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let best = weights[0].0;
    weights.retain(|w| w.0 >= min_p * best);
    if top_k > 0 {
        weights.truncate(top_k);
    }
    let total: f64 = weights.iter().map(|w| w.0).sum();
    let mut sum = 0.0;
    weights.retain(|w| {
        let is_inside = sum < top_p * total || sum == 0.0;
        sum += w.0;
        is_inside
    });
    let total: f64 = weights.iter().map(|w| w.0).sum();
    let mut p = vec![0.0; row.len()];
    weights.iter().for_each(|w| p[w.1] = w.0 / total);
    p
}

#[test]
fn a_draw_is_keyed_by_seed_and_position() {
    let draws: Vec<f64> = (0..1000).map(|i| uniform(i / 10, i % 10, Purpose::NextToken)).collect();
    let mean = draws.iter().sum::<f64>() / 1000.0;
    assert!((mean - 0.5).abs() < 0.05, "{mean}");
    assert_eq!(uniform(7, 3, Purpose::NextToken), uniform(7, 3, Purpose::NextToken));
    assert_ne!(uniform(7, 3, Purpose::NextToken), uniform(3, 7, Purpose::NextToken));
}
