//! Owns the price of scheduling: microseconds of a decode step outside the runner.
//!
//! `cargo run --release -p glm-simulator --example bench_scheduler [FILE.svg]` prints a table as running
//! sequences, their context and the queue grow, and draws it. Schedule, plan, sampling from eight logits
//! and bookkeeping are in it, the runner is not there, the best of several rounds counts.

use std::fmt::Write;
use std::time::{Duration, Instant};

use glm_engine::{Engine, EngineConfig, Request, SamplingParams, TenantId};
use glm_simulator::machine::{Machine, VOCAB_SIZE};

const SEQUENCES: [usize; 5] = [1, 4, 16, 64, 256];
const CONTEXTS: [usize; 3] = [128, 1_024, 8_000];
const QUEUES: [usize; 3] = [0, 100, 10_000];
const NUM_TENANTS: usize = 16;
const NUM_STEPS: u32 = 40;
const NUM_ROUNDS: usize = 5;
const COLOURS: [&str; 3] = ["#1b7837", "#2166ac", "#b2182b"];

fn request(tenant: usize, num_prompt_tokens: usize, max_tokens: usize, salt: usize) -> Request {
    Request {
        prompt_token_ids: (0..num_prompt_tokens).map(|i| ((i * 7 + salt) % 8) as u32).collect(),
        sampling: SamplingParams { temperature: 0.0, max_tokens, ignore_eos: true, ..Default::default() },
        tenant: TenantId(tenant as u32),
        ..Default::default()
    }
}

/// Microseconds of a step in which every running sequence takes a token and the queue stands.
#[allow(clippy::disallowed_methods, reason = "a bench owns its clock")]
fn decode_step(num_sequences: usize, context: usize, queue: usize) -> f64 {
    let num_blocks = num_sequences * (context + 512).div_ceil(16);
    let config = EngineConfig {
        max_num_seqs: num_sequences,
        max_num_batched_tokens: 1 << 20,
        max_model_len: 8_192 + 512,
        max_num_waiting: queue,
        tenant_weights: vec![1; NUM_TENANTS],
        ..Default::default()
    };
    let mut engine = Engine::new(Machine::new(num_blocks, 16), config, VOCAB_SIZE);
    for id in 0..num_sequences + queue {
        let tokens = if id < num_sequences { context } else { 16 };
        engine.submit(request(id % NUM_TENANTS, tokens, 500, id), Duration::ZERO);
    }
    while engine.scheduler().running().len() < num_sequences
        || engine.scheduler().decodes().num_decodes < num_sequences
    {
        engine.step(Duration::ZERO, usize::MAX);
    }
    let round = |engine: &mut Engine<Machine>| {
        let start = Instant::now();
        for _ in 0..NUM_STEPS {
            engine.step(Duration::ZERO, usize::MAX);
        }
        start.elapsed().as_secs_f64() * 1e6 / f64::from(NUM_STEPS)
    };
    (0..NUM_ROUNDS).map(|_| round(&mut engine)).fold(f64::INFINITY, f64::min)
}

/// Lines over the number of sequences, both axes logarithmic: one a context, with the longest queue.
fn svg(lines: &[(usize, Vec<f64>)]) -> String {
    let x = |sequences: usize| 60.0 + 55.0 * (sequences as f64).log2();
    let y = |micros: f64| 260.0 - 60.0 * micros.max(0.1).log10();
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"620\" height=\"360\" font-family=\"sans-serif\" \
         font-size=\"12\"><text x=\"60\" y=\"20\">Scheduling, microseconds a step, by running sequences</text>\n",
    );
    for sequences in SEQUENCES {
        let _ = writeln!(svg, "<text x=\"{:.0}\" y=\"345\">{sequences}</text>", x(sequences));
    }
    for micros in [1.0, 10.0, 100.0, 1_000.0] {
        let at = y(micros);
        let _ = writeln!(
            svg,
            "<path d=\"M60 {at:.0}H520\" stroke=\"#ddd\"/><text x=\"10\" y=\"{at:.0}\">{micros}</text>"
        );
    }
    for ((context, line), colour) in lines.iter().zip(COLOURS) {
        let points: Vec<String> = SEQUENCES
            .iter()
            .zip(line)
            .map(|(&sequences, &micros)| format!("{:.1},{:.1}", x(sequences), y(micros)))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <text x=\"525\" y=\"{:.0}\" fill=\"{colour}\">{context} tokens</text>",
            points.join(" "),
            y(line[line.len() - 1])
        );
    }
    svg + "</svg>\n"
}

fn main() -> std::io::Result<()> {
    println!("microseconds a step; {NUM_TENANTS} tenants");
    println!("{:>9} {:>8} {:>8} {:>8} {:>8}", "sequences", "context", "queue 0", "100", "10,000");
    let mut lines = Vec::new();
    for context in CONTEXTS {
        let mut line = Vec::new();
        for sequences in SEQUENCES {
            let micros = QUEUES.map(|queue| decode_step(sequences, context, queue));
            println!("{sequences:>9} {context:>8} {:>8.1} {:>8.1} {:>8.1}", micros[0], micros[1], micros[2]);
            line.push(micros[2]);
        }
        lines.push((context, line));
    }
    match std::env::args().nth(1) {
        Some(path) => std::fs::write(path, svg(&lines)),
        None => Ok(()),
    }
}
