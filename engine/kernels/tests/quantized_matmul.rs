//! Owns the proof that the matrix product works inside ONNX Runtime: through a real CPU session.

mod graph;

use graph::{Graph, Type, Value};
use ort::session::Session;
use ort::value::Tensor;

use glm_kernels::OWN_DOMAIN;

const K: usize = 192;
const N: usize = 90;
const BLOCK: usize = 64;
/// Panels of 32 columns without epilogue, and of 16 with it: 90 rows are 45 pairs.
const PANELS: usize = 3;

fn noise(i: usize) -> f32 {
    let mut z = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((z >> 40) as f32) / (1 << 23) as f32 - 1.0
}

fn code(row: usize, k: usize) -> u8 {
    ((row * 31 + k * 17 + row * k) % 256) as u8
}

/// What a code of row `row` is multiplied by: a power of two, by the pattern of its float16.
fn scale(row: usize) -> (f64, u16) {
    let exponent = 4 + (row % 3) as u16;
    (2f64.powi(i32::from(exponent) - 15), exponent << 10)
}

/// The matrix's row that column `c` of panel `p` is.
fn row_of(p: usize, c: usize, swiglu: bool) -> Option<usize> {
    let (row, end) = match (swiglu, c < 16) {
        (false, _) => (32 * p + c, N),
        (true, true) => (16 * p + c, N / 2),
        (true, false) => (N / 2 + 16 * p + c - 16, N),
    };
    (row < end).then_some(row)
}

fn weights(swiglu: bool) -> Vec<u8> {
    let mut bytes = vec![];
    for p in 0..PANELS {
        for b in 0..K / BLOCK {
            for s in 0..BLOCK / 4 {
                bytes.extend((0..128).map(|i| {
                    row_of(p, i / 4, swiglu).map_or(128, |row| code(row, b * BLOCK + 4 * s + i % 4))
                }));
            }
            let scales = (0..32).map(|c| row_of(p, c, swiglu).map_or(0, |row| scale(row).1));
            bytes.extend(scales.flat_map(u16::to_le_bytes));
        }
    }
    bytes
}

fn bias(swiglu: bool) -> Vec<f32> {
    let value = |row: Option<usize>| row.map_or(0.0, |row| row as f32 / 10.0 - 4.0);
    (0..PANELS * 32).map(|i| value(row_of(i / 32, i % 32, swiglu))).collect()
}

fn attributes(swiglu: bool) -> Vec<(&'static str, Value)> {
    vec![
        ("K", Value::Int(K as i64)),
        ("N", Value::Int(N as i64)),
        ("bits", Value::Int(8)),
        ("block_size", Value::Int(BLOCK as i64)),
        ("epilogue", Value::Text(if swiglu { "swiglu" } else { "none" })),
    ]
}

/// Weights come as an input, so that a test may give wrong ones.
fn session(threads: usize, attributes: &[(&str, Value)], has_bias: bool) -> ort::Result<Session> {
    let mut graph = Graph::default();
    graph.input("x", Type::Float32, 2).input("weights", Type::Uint8, 2).output("output", 2);
    let mut inputs = vec!["x", "weights"];
    if has_bias {
        graph.input("bias", Type::Float32, 2);
        inputs.push("bias");
    }
    graph.node((OWN_DOMAIN, "QuantizedMatMul"), &inputs, &["output"], attributes);
    graph.session(threads)
}

fn run(
    session: &mut Session,
    x: ([usize; 2], Vec<f32>),
    weights: ([usize; 2], Vec<u8>),
    bias: Option<Vec<f32>>,
) -> ort::Result<(Vec<i64>, Vec<f32>)> {
    let mut inputs = ort::inputs!["x" => Tensor::from_array(x)?, "weights" => Tensor::from_array(weights)?];
    if let Some(bias) = bias {
        inputs.push(("bias".into(), Tensor::from_array(([PANELS, 32], bias))?.into()));
    }
    let outputs = session.run(inputs)?;
    let (shape, rows) = outputs["output"].try_extract_tensor::<f32>()?;
    Ok((shape.to_vec(), rows.to_vec()))
}

fn x(rows: usize) -> ([usize; 2], Vec<f32>) {
    ([rows, K], (0..rows * K).map(noise).collect())
}

fn packed(swiglu: bool) -> ([usize; 2], Vec<u8>) {
    let bytes = weights(swiglu);
    ([PANELS, bytes.len() / PANELS], bytes)
}

/// A row of the output in float64.
fn expected(row: usize, swiglu: bool, has_bias: bool) -> Vec<f64> {
    let sums: Vec<f64> = (0..N)
        .map(|n| {
            let dot: f64 =
                (0..K).map(|k| f64::from(noise(row * K + k)) * (f64::from(code(n, k)) - 128.0)).sum();
            dot * scale(n).0 + if has_bias { n as f64 / 10.0 - 4.0 } else { 0.0 }
        })
        .collect();
    if !swiglu {
        return sums;
    }
    let (gates, ups) = sums.split_at(N / 2);
    gates.iter().zip(ups).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
}

#[test]
fn a_session_computes_it_alike_for_any_threads_and_rows() {
    for (swiglu, has_bias) in [(false, true), (true, true), (true, false)] {
        let width = if swiglu { N / 2 } else { N };
        let mut first: Option<Vec<u32>> = None;
        for threads in [1, 2] {
            let mut session = session(threads, &attributes(swiglu), has_bias).unwrap();
            for rows in [300, 37, 16, 1, 0] {
                let bias = has_bias.then(|| bias(swiglu));
                let (shape, output) = run(&mut session, x(rows), packed(swiglu), bias).unwrap();
                assert_eq!(shape, [rows as i64, width as i64]);
                let (mut error, mut norm) = (0.0, 0.0);
                for (row, output) in output.chunks_exact(width).enumerate().take(10) {
                    for (got, want) in output.iter().zip(expected(row, swiglu, has_bias)) {
                        error += (f64::from(*got) - want).powi(2);
                        norm += want * want;
                    }
                }
                assert!(error.sqrt() <= 0.02 * norm.sqrt(), "{swiglu} {rows} rows: {error} of {norm}");
                let bits: Vec<u32> = output.iter().map(|x| x.to_bits()).collect();
                let most = first.get_or_insert_with(|| bits.clone());
                assert!(most[..bits.len()] == bits[..], "{rows} rows or {threads} threads change bits");
            }
        }
    }
}

const EPSILON: f32 = 1e-3;

/// A session whose product has the norm as an input, or a node for it.
fn normed(fused: bool, attributes: &[(&str, Value)]) -> Session {
    let norm = [("axis", Value::Int(-1)), ("epsilon", Value::Float(EPSILON))];
    let mut graph = Graph::default();
    graph.input("x", Type::Float32, 2).input("weights", Type::Uint8, 2).input("norm", Type::Float32, 1);
    graph.output("output", 2);
    if fused {
        let inputs = ["x", "weights", "", "norm"];
        graph.node((OWN_DOMAIN, "QuantizedMatMul"), &inputs, &["output"], attributes);
    } else {
        graph.node(("", "SimplifiedLayerNormalization"), &["x", "norm"], &["normed"], &norm);
        graph.node((OWN_DOMAIN, "QuantizedMatMul"), &["normed", "weights"], &["output"], attributes);
    }
    graph.session(2).unwrap()
}

fn run_normed(session: &mut Session, norm: Vec<f32>) -> ort::Result<Vec<f32>> {
    let (x, weights) = (Tensor::from_array(x(37))?, Tensor::from_array(packed(false))?);
    let norm = Tensor::from_array(([norm.len()], norm))?;
    let outputs = session.run(ort::inputs!["x" => x, "weights" => weights, "norm" => norm])?;
    Ok(outputs["output"].try_extract_tensor::<f32>()?.1.to_vec())
}

#[test]
fn a_norm_may_come_with_the_product() {
    let norm: Vec<f32> = (0..K).map(|k| 1.0 + noise(7 * k)).collect();
    let plain = attributes(false);
    let with_epsilon = [&plain[..], &[("epsilon", Value::Float(EPSILON))]].concat();
    let want = run_normed(&mut normed(false, &plain), norm.clone()).unwrap();
    let mut fused = normed(true, &with_epsilon);
    let found = run_normed(&mut fused, norm.clone()).unwrap();
    let (mut error, mut size) = (0.0, 0.0);
    for (found, want) in found.iter().zip(want) {
        error += f64::from(found - want).powi(2);
        size += f64::from(want).powi(2);
    }
    // Here and there a value becomes the other one of two whole numbers.
    assert!(error.sqrt() <= 1e-3 * size.sqrt(), "{error} of {size}");

    let refused = |session: &mut Session, norm| run_normed(session, norm).unwrap_err().to_string();
    let words = refused(&mut fused, vec![1.0; K - 1]);
    assert!(words.contains("QuantizedMatMul: norm: shape [191] is not [192]"), "{words}");
    let words = refused(&mut normed(true, &plain), norm);
    assert!(words.contains("QuantizedMatMul: epsilon is missing"), "{words}");
}

#[test]
fn what_does_not_fit_is_an_error_that_names_it() {
    let mut session = session(1, &attributes(false), true).unwrap();
    let mut refused = |x: [usize; 2], weights: [usize; 2], words: &str| {
        let x = (x, vec![0.0; x[0] * x[1]]);
        let weights = (weights, vec![0; weights[0] * weights[1]]);
        let error = run(&mut session, x, weights, Some(bias(false))).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    let bytes = packed(false).0[1];
    refused([2, K - 1], [PANELS, bytes], "QuantizedMatMul: x: shape [2, 191] is not [rows, 192]");
    refused([2, K], [PANELS, bytes - 64], "QuantizedMatMul: weights: shape");
    refused([2, K], [PANELS + 1, bytes], "QuantizedMatMul: weights: shape");
}

#[test]
fn attributes_that_mean_something_else_are_refused_when_the_session_is_made() {
    for (name, value) in
        [("bits", Value::Int(3)), ("block_size", Value::Int(48)), ("epilogue", Value::Text("gelu"))]
    {
        let mut attributes = attributes(false);
        attributes.retain(|(other, _)| *other != name);
        attributes.push((name, value));
        let Err(refused) = session(1, &attributes, false) else { panic!("{name} was accepted") };
        let refused = refused.to_string();
        assert!(refused.contains(&format!("QuantizedMatMul: {name} is")), "{refused}");
    }
}
