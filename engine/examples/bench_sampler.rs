//! Owns the timings of the sampler: microseconds a row, for rows of ChatGLM3's vocabulary.
//!
//! `cargo run --release -p glm-engine --example bench_sampler`. Figures are the best of many steps, the
//! last column with the rows of a step shared by two threads that are made for it.

use std::time::{Duration, Instant};

use glm_engine::Sampler;
use glm_engine::Sequence;
use glm_engine::{Request, RequestId, SamplingParams};

const VOCAB_SIZE: usize = 65_024;

#[allow(clippy::disallowed_methods, reason = "a bench owns its clock")]
fn best_us_per_row(num_rows: usize, mut step: impl FnMut()) -> f64 {
    let once = |step: &mut dyn FnMut()| {
        let start = Instant::now();
        step();
        start.elapsed().as_secs_f64()
    };
    let num_steps = (1_000 / num_rows).max(20);
    let best = (0..num_steps).map(|_| once(&mut step)).fold(f64::INFINITY, f64::min);
    best * 1e6 / num_rows as f64
}

fn main() {
    let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
    let cases = [
        ("greedy", greedy.clone()),
        ("temperature 1", SamplingParams::default()),
        ("0.8, top_p 0.8", SamplingParams { temperature: 0.8, top_p: 0.8, ..Default::default() }),
        ("0.8, top_k 50", SamplingParams { temperature: 0.8, top_k: 50, ..Default::default() }),
        ("greedy, penalty", SamplingParams { repetition_penalty: 1.1, ..greedy }),
    ];
    println!("{:<16} {:>5} {:>10} {:>10}", "sampling", "rows", "us a row", "2 threads");
    for (name, sampling) in cases {
        for num_rows in [1, 16, 64] {
            // Few good tokens and a long tail, as a model's rows are.
            let hash = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            let value = |i: usize| (hash(i) as f32 / (1 << 24) as f32).powi(40) * 25.0 - 5.0;
            let rows: Vec<f32> = (0..num_rows * VOCAB_SIZE).map(value).collect();
            let request = |row| Request {
                prompt_token_ids: (0..200).collect(),
                sampling: SamplingParams { seed: row, ..sampling.clone() },
                ..Request::default()
            };
            let sequence = |row| Sequence::new(RequestId(row), request(row), Duration::ZERO);
            let sequences: Vec<Sequence> = (0..num_rows as u64).map(sequence).collect();
            let sample = |sampler: &mut Sampler, from: usize, to: usize| {
                let rows = rows[from * VOCAB_SIZE..to * VOCAB_SIZE].chunks(VOCAB_SIZE);
                for (row, sequence) in rows.zip(&sequences[from..to]) {
                    sampler.sample(row, sequence).expect("finite");
                }
            };
            let (mut first, mut second) = (Sampler::new(VOCAB_SIZE), Sampler::new(VOCAB_SIZE));
            let alone = best_us_per_row(num_rows, || sample(&mut first, 0, num_rows));
            let shared = best_us_per_row(num_rows, || {
                std::thread::scope(|scope| {
                    scope.spawn(|| sample(&mut second, num_rows / 2, num_rows));
                    sample(&mut first, 0, num_rows / 2);
                });
            });
            println!("{name:<16} {num_rows:>5} {alone:>10.1} {shared:>10.1}");
        }
    }
}
