//! Owns the timings of the matrix product: all products of a model's step, through a real session.
//!
//! `cargo run --release -p glm-kernels --example bench_matmul [KERNEL] [BITS] [BLOCK_SIZE] [ROWS ...]`
//! where KERNEL is `ours`, `ort` (MatMulNBits) or `both`, with `GLMSERVE_SIMD` to force an instruction
//! set. The graph is that of an export without attention, each product a node: 24 layers of width 1024
//! (8 heads of 128, 2 key heads, ffn 3072) and a head of 65024, on every row. Weights are random. The
//! limits are what plain loops reach on this machine before each row.

#[path = "../tests/graph/mod.rs"]
mod graph;
mod limits;

use std::hint::black_box;
use std::time::Instant;

use glm_kernels::{DOMAIN, OWN_DOMAIN};
use graph::{Graph, PLAIN, Type, Value};
use ort::session::Session;
use ort::value::Tensor;

const LAYERS: usize = 24;
const HIDDEN: usize = 1024;
const QKV: usize = 1024 + 2 * 2 * 128;
const FFN: usize = 3072;
const VOCAB: usize = 65024;
const THREADS: usize = 2;
const SECONDS: f64 = 1.5;

/// How weights are stored, and by whose kernel they are read.
#[derive(Clone, Copy)]
struct Format {
    ours: bool,
    bits: usize,
    block_size: usize,
}

fn main() -> ort::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, unless: usize| {
        arguments.get(i).map_or(unless, |text| text.parse().expect("a number of bits, block size or rows"))
    };
    let kernel = arguments.first().map_or("both", String::as_str);
    let (bits, block_size) = (number(1, 4), number(2, 64));
    let rows: Vec<usize> = match arguments.len() {
        0..=3 => vec![1, 4, 16, 32, 128, 512],
        len => (3..len).map(|i| number(i, 1)).collect(),
    };
    println!(
        "{:<6} {:>5} {:>9} {:>9} {:>7} {:>6} {:>18} {:>14}",
        "kernel", "rows", "best tok/s", "median", "GOPS", "GB/s", "read GB/s (share)", "VNNI GOPS"
    );
    for ours in [true, false] {
        if (kernel == "ours" && !ours) || (kernel == "ort" && ours) {
            continue;
        }
        let format = Format { ours, bits, block_size };
        let (mut session, num_bytes) = model(format)?;
        for &rows in &rows {
            bench(&mut session, format, num_bytes, rows)?;
        }
    }
    Ok(())
}

#[allow(clippy::disallowed_methods, reason = "a bench owns its clock")]
fn now() -> Instant {
    Instant::now()
}

fn bench(session: &mut Session, format: Format, num_bytes: usize, rows: usize) -> ort::Result<()> {
    let noise = (0..rows * HIDDEN).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0);
    let x = Tensor::from_array(([rows, HIDDEN], noise.collect::<Vec<_>>()))?;
    let (read, peak) = (limits::read_gb_per_s(THREADS), limits::int8_vnni_gops(THREADS));
    let mut seconds = vec![];
    let start = now();
    while seconds.len() < 3 || start.elapsed().as_secs_f64() < SECONDS {
        let begin = now();
        black_box(session.run(ort::inputs!["x" => &x])?);
        seconds.push(begin.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let (best, median) = (seconds[0], seconds[seconds.len() / 2]);
    let weights = LAYERS * HIDDEN * (QKV + HIDDEN + 3 * FFN) + VOCAB * HIDDEN;
    let speed = num_bytes as f64 / best;
    println!(
        "{:<6} {rows:>5} {:>9.0} {:>9.0} {:>7.0} {:>6.1} {:>11.1} ({:>3.0}%) {:>14}",
        if format.ours { "ours" } else { "ort" },
        rows as f64 / best,
        rows as f64 / median,
        2e-9 * (weights * rows) as f64 / best,
        speed / 1e9,
        read,
        speed / read / 1e7,
        peak.map_or("-".to_owned(), |peak| format!("{peak:.0}")),
    );
    Ok(())
}

/// Each matrix has a content of its own: ONNX Runtime keeps one of what is equal, and reads that out of a
/// cache.
fn seed(name: &str) -> usize {
    name.bytes().fold(7, |seed, byte| seed * 31 + usize::from(byte))
}

/// Random bytes; as float16 or float32 none of them is used.
fn bytes(seed: usize, len: usize) -> Vec<u8> {
    let mut state = seed as u64 + 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
            (state >> 56) as u8
        })
        .collect()
}

/// A session over the model, and the bytes of its weights.
fn model(format: Format) -> ort::Result<(Session, usize)> {
    let mut graph = Graph::default();
    graph.input("x", Type::Float32, 2).output("logits", 2);
    let int64 = |graph: &mut Graph, name: &str, value: i64| {
        graph.tensor(name, Type::Int64, &[1], &value.to_le_bytes());
    };
    int64(&mut graph, "zero", 0);
    int64(&mut graph, "one", 1);
    int64(&mut graph, "hidden", HIDDEN as i64);
    graph.tensor("norm", Type::Float32, &[HIDDEN], &1f32.to_le_bytes().repeat(HIDDEN));
    let mut num_bytes = 0;
    let mut x = "x".to_owned();
    for layer in 0..LAYERS {
        let name = |part: &str| format!("{layer}.{part}");
        norm(&mut graph, &x, &name("normed"));
        num_bytes += linear(&mut graph, format, &name("normed"), &name("qkv"), HIDDEN, QKV, false);
        // Where attention would be.
        graph.node((PLAIN, "Slice"), &[&name("qkv"), "zero", "hidden", "one"], &[&name("query")], &[]);
        num_bytes += linear(&mut graph, format, &name("query"), &name("dense"), HIDDEN, HIDDEN, false);
        norm(&mut graph, &name("dense"), &name("normed2"));
        num_bytes += linear(&mut graph, format, &name("normed2"), &name("up"), HIDDEN, 2 * FFN, true);
        num_bytes += linear(&mut graph, format, &name("up"), &name("down"), FFN, HIDDEN, false);
        x = name("down");
    }
    norm(&mut graph, &x, "normed");
    num_bytes += linear(&mut graph, format, "normed", "logits", HIDDEN, VOCAB, false);
    Ok((graph.session(THREADS)?, num_bytes))
}

fn norm(graph: &mut Graph, x: &str, y: &str) {
    let attributes = [("axis", Value::Int(-1)), ("epsilon", Value::Float(1e-5))];
    graph.node((PLAIN, "SimplifiedLayerNormalization"), &[x, "norm"], &[y], &attributes);
}

/// Adds `y = x * matrix`, with SwiGLU if so wanted; returns the matrix's bytes.
fn linear(graph: &mut Graph, format: Format, x: &str, y: &str, k: usize, n: usize, swiglu: bool) -> usize {
    let Format { bits, block_size, .. } = format;
    let weights = format!("{y}.weights");
    let size = |value: usize| Value::Int(value as i64);
    let mut attributes =
        vec![("K", size(k)), ("N", size(n)), ("bits", size(bits)), ("block_size", size(block_size))];
    if format.ours {
        let lines = block_size / 4 * bits / 4;
        let shape = [n.div_ceil(32), k / block_size * (lines + 1) * 64];
        let mut content = bytes(seed(y), shape[0] * shape[1]);
        for block in content.chunks_exact_mut((lines + 1) * 64) {
            // A scale of about 2^-8 in each column.
            block[lines * 64..].as_chunks_mut().0.fill(0x1c12u16.to_le_bytes());
        }
        graph.tensor(&weights, Type::Uint8, &shape, &content);
        attributes.push(("epilogue", Value::Text(if swiglu { "swiglu" } else { "none" })));
        graph.node((OWN_DOMAIN, "QuantizedMatMul"), &[x, &weights], &[y], &attributes);
        return content.len();
    }
    let (blocks, scales) = (k / block_size, format!("{y}.scales"));
    let content = bytes(seed(y), n * k * bits / 8);
    graph.tensor(&weights, Type::Uint8, &[n, blocks, block_size * bits / 8], &content);
    graph.tensor(&scales, Type::Float32, &[n, blocks], &0.004f32.to_le_bytes().repeat(n * blocks));
    attributes.push(("accuracy_level", Value::Int(4)));
    let product = if swiglu { format!("{y}.both") } else { y.to_owned() };
    graph.node((DOMAIN, "MatMulNBits"), &[x, &weights, &scales], &[&product], &attributes);
    if swiglu {
        let part = |name: &str| format!("{y}.{name}");
        let halves = [("axis", Value::Int(1)), ("num_outputs", Value::Int(2))];
        graph.node((PLAIN, "Split"), &[&product], &[&part("gate"), &part("other")], &halves);
        let alpha = [("alpha", Value::Float(1.0))];
        graph.node((DOMAIN, "QuickGelu"), &[&part("gate")], &[&part("silu")], &alpha);
        graph.node((PLAIN, "Mul"), &[&part("silu"), &part("other")], &[y], &[]);
    }
    content.len() + 4 * n * blocks
}
