//! Owns the proof that PostAttention works inside ONNX Runtime: against float64, and the nodes that it replaces.

mod graph;

use graph::{Graph, Type, Value};
use ort::session::Session;
use ort::value::Tensor;

use glm_kernels::{DOMAIN, OWN_DOMAIN};

/// Widths of the attention, the residual, the network between, and of what is projected.
const K: usize = 128;
const HIDDEN: usize = 192;
const FFN: usize = 320;
const NEXT: usize = 90;
const BLOCK: usize = 64;
const EPSILON: f32 = 1e-5;
/// The exponent of 2 that a code is multiplied by: outputs are near 1.
const SCALE: i32 = -10;
/// Rows of the largest batch.
const ROWS: usize = 70;

/// The products: name, columns, rows, whether rows are a gate and its values.
const PRODUCTS: [(&str, usize, usize, bool); 4] = [
    ("dense", K, HIDDEN, false),
    ("gate_up", HIDDEN, 2 * FFN, true),
    ("down", FFN, HIDDEN, false),
    ("next", HIDDEN, NEXT, false),
];

/// From -1 to 1.
fn noise(seed: usize, i: usize) -> f32 {
    let mut z = ((seed << 32) as u64 + i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((z >> 40) as f32) / (1 << 23) as f32 - 1.0
}

fn noises(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| noise(seed, i)).collect()
}

fn code(product: usize, row: usize, k: usize) -> u8 {
    (128.0 + 127.0 * noise(10 + product, row * 1000 + k)) as u8
}

fn bias(row: usize) -> f32 {
    row as f32 / 50.0 - 0.9
}

fn norm_weight(norm: usize) -> Vec<f32> {
    noises(20 + norm, HIDDEN).iter().map(|x| 1.0 + x / 2.0).collect()
}

/// The matrix's row that column `c` of panel `p` is.
fn row_of(p: usize, c: usize, n: usize, swiglu: bool) -> Option<usize> {
    let (row, end) = match (swiglu, c < 16) {
        (false, _) => (32 * p + c, n),
        (true, true) => (16 * p + c, n / 2),
        (true, false) => (n / 2 + 16 * p + c - 16, n),
    };
    (row < end).then_some(row)
}

fn num_panels(n: usize, swiglu: bool) -> usize {
    if swiglu { (n / 2).div_ceil(16) } else { n.div_ceil(32) }
}

fn packed(product: usize) -> Vec<u8> {
    let (_, k, n, swiglu) = PRODUCTS[product];
    let mut bytes = vec![];
    for p in 0..num_panels(n, swiglu) {
        for b in 0..k / BLOCK {
            for s in 0..BLOCK / 4 {
                bytes.extend((0..128).map(|i| {
                    row_of(p, i / 4, n, swiglu)
                        .map_or(128, |row| code(product, row, b * BLOCK + 4 * s + i % 4))
                }));
            }
            let scale = ((15 + SCALE) as u16) << 10;
            bytes.extend((0..32).flat_map(|c| row_of(p, c, n, swiglu).map_or(0, |_| scale).to_le_bytes()));
        }
    }
    bytes
}

fn packed_bias() -> Vec<f32> {
    (0..num_panels(NEXT, false) * 32).map(|i| if i < NEXT { bias(i) } else { 0.0 }).collect()
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A graph with the weights, as constants.
fn graph() -> Graph {
    let mut graph = Graph::default();
    graph.input("attention", Type::Float32, 2).input("residual", Type::Float32, 2);
    graph.output("projected", 2).output("updated", 2);
    for (i, (name, _, n, swiglu)) in PRODUCTS.into_iter().enumerate() {
        let (bytes, panels) = (packed(i), num_panels(n, swiglu));
        graph.tensor(name, Type::Uint8, &[panels, bytes.len() / panels], &bytes);
    }
    for (i, name) in ["post_norm", "next_norm"].into_iter().enumerate() {
        graph.tensor(name, Type::Float32, &[HIDDEN], &le_bytes(&norm_weight(i)));
    }
    graph.tensor("bias", Type::Float32, &[num_panels(NEXT, false), 32], &le_bytes(&packed_bias()));
    graph
}

const INPUTS: [&str; 9] =
    ["attention", "residual", "dense", "post_norm", "gate_up", "down", "next_norm", "next", "bias"];

fn attributes() -> Vec<(&'static str, Value)> {
    let int = |value: usize| Value::Int(value as i64);
    vec![
        ("K", int(K)),
        ("hidden", int(HIDDEN)),
        ("ffn", int(FFN)),
        ("N", int(NEXT)),
        ("bits", int(8)),
        ("epsilon", Value::Float(EPSILON)),
        ("dense_block_size", int(BLOCK)),
        ("gate_up_block_size", int(BLOCK)),
        ("down_block_size", int(BLOCK)),
        ("next_block_size", int(BLOCK)),
    ]
}

fn fused(threads: usize) -> Session {
    let mut graph = graph();
    graph.node((OWN_DOMAIN, "PostAttention"), &INPUTS, &["projected", "updated"], &attributes());
    graph.session(threads).unwrap()
}

/// The nodes that the fused one replaces.
fn nodes() -> Session {
    let mut graph = graph();
    let product = |graph: &mut Graph, i: usize, x: &str, y: &str| {
        let (name, k, n, swiglu) = PRODUCTS[i];
        let int = |value: usize| Value::Int(value as i64);
        let attributes = [
            ("K", int(k)),
            ("N", int(n)),
            ("bits", int(8)),
            ("block_size", int(BLOCK)),
            ("epilogue", Value::Text(if swiglu { "swiglu" } else { "none" })),
        ];
        let inputs = [x, name, if name == "next" { "bias" } else { "" }];
        graph.node((OWN_DOMAIN, "QuantizedMatMul"), &inputs, &[y], &attributes);
    };
    let norm = |graph: &mut Graph, x: &str, before: &str, weight: &str, sum: &str| {
        let attributes = [("epsilon", Value::Float(EPSILON))];
        let outputs = [&format!("{weight}.normed"), "", "", sum];
        graph.node((DOMAIN, "SkipSimplifiedLayerNormalization"), &[x, before, weight], &outputs, &attributes);
    };
    product(&mut graph, 0, "attention", "dense.rows");
    norm(&mut graph, "dense.rows", "residual", "post_norm", "middle");
    product(&mut graph, 1, "post_norm.normed", "gated");
    product(&mut graph, 2, "gated", "down.rows");
    norm(&mut graph, "down.rows", "middle", "next_norm", "updated");
    product(&mut graph, 3, "next_norm.normed", "projected");
    graph.session(2).unwrap()
}

/// Both outputs, in a row.
fn run(session: &mut Session, rows: usize) -> ort::Result<[Vec<f32>; 2]> {
    let inputs = ort::inputs![
        "attention" => Tensor::from_array(([rows, K], noises(1, rows * K)))?,
        "residual" => Tensor::from_array(([rows, HIDDEN], noises(2, rows * HIDDEN)))?,
    ];
    let outputs = session.run(inputs)?;
    let of = |name: &str, width: usize| -> ort::Result<Vec<f32>> {
        let (shape, values) = outputs[name].try_extract_tensor::<f32>()?;
        assert_eq!(**shape, [rows as i64, width as i64]);
        Ok(values.to_vec())
    };
    Ok([of("projected", NEXT)?, of("updated", HIDDEN)?])
}

/// Both outputs of one row in float64.
fn exact(row: usize) -> [Vec<f64>; 2] {
    let multiply = |i: usize, x: &[f64]| -> Vec<f64> {
        let weight = |r, k| (f64::from(code(i, r, k)) - 128.0) * 2f64.powi(SCALE);
        (0..PRODUCTS[i].2).map(|r| x.iter().enumerate().map(|(k, x)| x * weight(r, k)).sum()).collect()
    };
    let normed = |i: usize, x: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let factor = 1.0 / (mean + f64::from(EPSILON)).sqrt();
        x.iter().zip(norm_weight(i)).map(|(x, weight)| x * factor * f64::from(weight)).collect()
    };
    let add = |a: Vec<f64>, b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
    let of = |seed, width| (0..width).map(|i| f64::from(noise(seed, row * width + i))).collect::<Vec<_>>();
    let middle = add(multiply(0, &of(1, K)), &of(2, HIDDEN));
    let both = multiply(1, &normed(0, &middle));
    let (gates, ups) = both.split_at(FFN);
    let gated: Vec<f64> = gates.iter().zip(ups).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
    let updated = add(multiply(2, &gated), &middle);
    let biases: Vec<f64> = (0..NEXT).map(|row| f64::from(bias(row))).collect();
    [add(multiply(3, &normed(1, &updated)), &biases), updated]
}

/// How far rows are from what they are in float64, each output's in its norm.
fn errors(outputs: &[Vec<f32>; 2], rows: usize) -> [f64; 2] {
    let (mut error, mut norm) = ([0.0; 2], [0.0; 2]);
    for row in 0..rows {
        for (i, want) in exact(row).into_iter().enumerate() {
            for (want, got) in want.iter().zip(&outputs[i][row * want.len()..]) {
                error[i] += (f64::from(*got) - want).powi(2);
                norm[i] += want * want;
            }
        }
    }
    [0, 1].map(|i| (error[i] / norm[i]).sqrt())
}

#[test]
fn it_is_as_near_to_float64_as_the_nodes_that_it_replaces() {
    let found = errors(&run(&mut fused(2), 20).unwrap(), 20);
    let wanted = errors(&run(&mut nodes(), 20).unwrap(), 20);
    println!("fused {found:?}, nodes {wanted:?}");
    for (found, wanted) in found.into_iter().zip(wanted) {
        assert!(found < 0.02 && found < 1.05 * wanted, "{found} where the nodes have {wanted}");
    }
}

#[test]
fn a_session_computes_a_row_alike_for_any_threads_and_rows() {
    let mut first: Option<[Vec<u32>; 2]> = None;
    for threads in [1, 2] {
        let mut session = fused(threads);
        for rows in [ROWS, 17, 4, 1, 0] {
            let found =
                run(&mut session, rows).unwrap().map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
            let most = first.get_or_insert_with(|| found.clone());
            for (most, found) in most.iter().zip(&found) {
                assert!(most[..found.len()] == found[..], "{rows} rows or {threads} threads change bits");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let refused = |graph: &mut Graph, inputs: &[&str], attributes: &[(&str, Value)], words: &str| {
        graph.node((OWN_DOMAIN, "PostAttention"), inputs, &["projected", "updated"], attributes);
        let Err(error) = graph.session(1) else { panic!("accepted, not {words}") };
        assert!(error.to_string().contains(words), "{error}");
    };
    for (name, value, words) in [
        ("down_block_size", Value::Int(48), "PostAttention: down: block_size is 48"),
        ("K", Value::Int(100), "PostAttention: dense: K 100 is not a multiple of block_size 64"),
        ("N", Value::Int(0), "PostAttention: N is 0"),
        ("hidden", Value::Int(256), "PostAttention: dense: shape"),
    ] {
        let mut attributes = attributes();
        attributes.retain(|(other, _)| *other != name);
        attributes.push((name, value));
        refused(&mut graph(), &INPUTS, &attributes, words);
    }
    let without =
        |name: &str| attributes().into_iter().filter(|(other, _)| *other != name).collect::<Vec<_>>();
    refused(&mut graph(), &INPUTS, &without("epsilon"), "PostAttention: epsilon is missing");
    let mut inputs = INPUTS;
    inputs[6] = "residual";
    refused(&mut graph(), &inputs, &attributes(), "PostAttention: next_norm: is not a constant");

    let mut session = fused(1);
    let mut run = |attention: [usize; 2], residual: [usize; 2], words: &str| {
        let zeros = |shape: [usize; 2]| Tensor::from_array((shape, vec![0f32; shape[0] * shape[1]])).unwrap();
        let inputs = ort::inputs!["attention" => zeros(attention), "residual" => zeros(residual)];
        let error = session.run(inputs).map(drop).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    run([2, K - 1], [2, HIDDEN], "PostAttention: attention: shape [2, 127] is not [rows, 128]");
    run([2, K], [3, HIDDEN], "PostAttention: residual: shape [3, 192] is not [2, 192]");
}
