//! Owns the timings of the attention operator, through a real session: one layer, a call at a time.
//!
//! `cargo run --release -p glm-kernels --example bench_attention [THREADS] [CASE]`, with `GLMSERVE_SIMD`
//! to force an instruction set and `CASE` to run but one, by its number from 0. Figures are the median and
//! the best of many calls; the limits at the top are what this machine does in plain loops, just before.

#[path = "../tests/graph/mod.rs"]
mod graph;
mod limits;

use std::time::Instant;

use graph::attention::session;
use graph::{Type, Value};
use half::bf16;
use ndarray::{Array1, s};
use ort::value::{PrimitiveTensorElementType, Tensor};

const POSITIONS: usize = 8192;

/// A layer's sizes.
#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    /// Half the rotary width.
    half: usize,
}

const CHATGLM3: Model = Model { name: "chatglm3 32/2x128", heads: 32, kv_heads: 2, dim: 128, half: 32 };
const DEFAULT: Model = Model { name: "default 9/3x128", heads: 9, kv_heads: 3, dim: 128, half: 32 };

const SMALL: Model = Model { name: "model M 8/2x128", heads: 8, kv_heads: 2, dim: 128, half: 32 };

/// The case's sequences, cached tokens of each, and new tokens of each.
const CASES: [(usize, usize, usize); 12] = [
    (1, 0, 128),
    (1, 0, 1024),
    (1, 0, 4096),
    (1, 150, 1),
    (1, 1000, 1),
    (1, 4000, 1),
    (16, 150, 1),
    (16, 1000, 1),
    (16, 4000, 1),
    (64, 150, 1),
    (64, 1000, 1),
    (64, 4000, 1),
];

fn main() -> ort::Result<()> {
    let threads = std::env::args().nth(1).and_then(|threads| threads.parse().ok());
    let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    println!(
        "{threads} threads; limits: {} GFLOP/s in float32, {} in AMX's bfloat16, {:.0} GB/s of main memory",
        limits::fp32_gflops(threads).map_or("-".to_owned(), |most| format!("{most:.0}")),
        limits::bf16_amx_gflops(threads).map_or("-".to_owned(), |most| format!("{most:.0}")),
        limits::read_gb_per_s(threads)
    );
    println!(
        "{:<20} {:<5} {:>3} {:>6} {:>5} {:>9} {:>9} {:>9} {:>7}",
        "model", "cache", "B", "past", "new", "median ms", "best ms", "GFLOP/s", "GB/s"
    );
    let only: Option<usize> = std::env::args().nth(2).and_then(|case| case.parse().ok());
    for model in [CHATGLM3, SMALL, DEFAULT] {
        for (i, (sequences, past, new)) in CASES.into_iter().enumerate() {
            if only.is_some_and(|only| only != i) {
                continue;
            }
            bench::<f32>(model, ("f32", Type::Float32), (sequences, past, new), threads)?;
            bench::<bf16>(model, ("bf16", Type::Bfloat16), (sequences, past, new), threads)?;
        }
    }
    Ok(())
}

/// What a cache holds.
trait Element {
    fn of(x: f32) -> Self;
}

impl Element for f32 {
    fn of(x: f32) -> Self {
        x
    }
}

impl Element for bf16 {
    fn of(x: f32) -> Self {
        Self::from_f32(x)
    }
}

#[allow(clippy::disallowed_methods, reason = "a bench owns its clock")]
fn now() -> Instant {
    Instant::now()
}

/// A cache that starts at a line, as the engine's do.
fn aligned<E: PrimitiveTensorElementType + Copy + std::fmt::Debug + 'static>(
    shape: [usize; 4],
    elements: impl Iterator<Item = E>,
) -> ort::Result<Tensor<E>> {
    let mut elements: Vec<E> = elements.collect();
    let num_elements = elements.len();
    elements.extend_from_within(..64 / size_of::<E>());
    let start = elements.as_ptr().align_offset(64);
    elements.copy_within(..num_elements, start);
    let elements = Array1::from_vec(elements).slice_move(s![start..start + num_elements]);
    Tensor::from_array(elements.into_shape_with_order(shape).expect("that many elements"))
}

fn bench<E: PrimitiveTensorElementType + Element + Copy + std::fmt::Debug + 'static>(
    model: Model,
    (cache_name, cache_type): (&str, Type),
    (sequences, past, new): (usize, usize, usize),
    threads: usize,
) -> ort::Result<()> {
    let Model { heads, kv_heads, dim, half, .. } = model;
    let block = 32;
    let blocks = (past + new).div_ceil(block);
    let attributes = [
        ("num_heads", Value::Int(heads as i64)),
        ("kv_num_heads", Value::Int(kv_heads as i64)),
        ("do_rotary", Value::Int(1)),
        ("rotary_interleaved", Value::Int(1)),
    ];
    let mut session = session(threads, cache_type, &attributes, |name| name != "attention_metadata")?;
    let noise = |count: usize| (0..count).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect::<Vec<_>>();
    let tokens = sequences * new;
    let cache = [sequences * blocks, block, kv_heads, dim];
    // Neighbouring blocks of a sequence lie far apart, as they do after a while.
    let table: Vec<i32> =
        (0..sequences).flat_map(|s| (0..blocks).map(move |b| (b * sequences + s) as i32)).collect();
    let slots: Vec<i32> = (0..tokens)
        .map(|t| {
            let position = past + t % new;
            table[t / new * blocks + position / block] * block as i32 + (position % block) as i32
        })
        .collect();
    let query = Tensor::from_array((
        [tokens, (heads + 2 * kv_heads) * dim],
        noise(tokens * (heads + 2 * kv_heads) * dim),
    ))?;
    let key = aligned(cache, noise(cache.iter().product()).into_iter().map(E::of))?;
    let value = aligned(cache, noise(cache.iter().product()).into_iter().map(E::of))?;
    let bounds = (0..=sequences).map(|s| (s * new) as i32).collect::<Vec<_>>();
    let bounds = Tensor::from_array(([sequences + 1], bounds))?;
    let lens = Tensor::from_array(([sequences], vec![past as i32; sequences]))?;
    let table = Tensor::from_array(([sequences, blocks], table))?;
    let rotary = Tensor::from_array(([POSITIONS, half], noise(POSITIONS * half)))?;
    let slots = Tensor::from_array(([tokens], slots))?;

    let mut seconds = vec![];
    let start = now();
    while seconds.len() < 5 || (start.elapsed().as_secs_f64() < 0.7 && seconds.len() < 500) {
        let begin = now();
        session.run(ort::inputs![
            "query" => &query, "key_cache" => &key, "value_cache" => &value,
            "cumulative_sequence_length" => &bounds, "past_seqlens" => &lens, "block_table" => &table,
            "cos_cache" => &rotary, "sin_cache" => &rotary, "slot_mapping" => &slots,
        ])?;
        seconds.push(begin.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let (best, median) = (seconds[0], seconds[seconds.len() / 2]);
    let pairs: usize = (past + 1..=past + new).sum::<usize>() * sequences;
    let flops = (4 * pairs * heads * dim) as f64;
    let bytes = (2 * sequences * (past + new) * kv_heads * dim * size_of::<E>()) as f64;
    println!(
        "{:<20} {cache_name:<5} {sequences:>3} {past:>6} {new:>5} {:>9.3} {:>9.3} {:>9.0} {:>7.1}",
        model.name,
        median * 1e3,
        best * 1e3,
        flops / best / 1e9,
        bytes / best / 1e9
    );
    Ok(())
}
