//! Owns the proof that the operator works inside ONNX Runtime: through a real CPU session.

mod graph;

use graph::attention::session;
use graph::{Type, Value};
use half::bf16;
use ort::session::Session;
use ort::value::{PrimitiveTensorElementType, Tensor};

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const DIM: usize = 32;
const BLOCK: usize = 16;
const NUM_BLOCKS: usize = 12;
const POSITIONS: usize = 96;
const WIDTH: usize = (HEADS + 2 * KV_HEADS) * DIM;
const CACHE: [usize; 4] = [NUM_BLOCKS, BLOCK, KV_HEADS, DIM];

const ATTRIBUTES: [(&str, Value); 4] = [
    ("num_heads", Value::Int(HEADS as i64)),
    ("kv_num_heads", Value::Int(KV_HEADS as i64)),
    ("do_rotary", Value::Int(1)),
    ("rotary_interleaved", Value::Int(1)),
];

/// Noise that depends on `i` only.
fn noise(i: usize) -> f32 {
    let mut z = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((z >> 40) as f32) / (1 << 23) as f32 - 1.0
}

fn token(position: usize) -> Vec<f32> {
    (0..WIDTH).map(|i| noise(position * WIDTH + i)).collect()
}

fn table(f: fn(f64) -> f64) -> Vec<f32> {
    (0..POSITIONS * DIM / 4)
        .map(|i| f((i / (DIM / 4)) as f64 * 0.3f64.powi((i % (DIM / 4)) as i32)) as f32)
        .collect()
}

/// One sequence in the blocks 7, 2, 9, ...: `len` tokens from `past` on.
struct Call {
    past: usize,
    len: usize,
    slots: bool,
    metadata: bool,
}

const BLOCKS: [i32; 6] = [7, 2, 9, 4, 11, 0];

/// An element of a cache.
trait Element: PrimitiveTensorElementType + Copy + std::fmt::Debug + 'static {
    const TYPE: Type;
    /// What a product of two numbers near 1 may be off by.
    const TOLERANCE: f64;
    fn of(x: f32) -> Self;
    fn is_nan(self) -> bool;
}

impl Element for f32 {
    const TYPE: Type = Type::Float32;
    const TOLERANCE: f64 = 1e-5;
    fn of(x: f32) -> Self {
        x
    }
    fn is_nan(self) -> bool {
        self.is_nan()
    }
}

impl Element for bf16 {
    const TYPE: Type = Type::Bfloat16;
    const TOLERANCE: f64 = 1e-2;
    fn of(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn is_nan(self) -> bool {
        self.is_nan()
    }
}

fn run<E: Element>(
    session: &mut Session,
    key: &Tensor<E>,
    value: &Tensor<E>,
    call: &Call,
) -> ort::Result<Vec<f32>> {
    let Call { past, len, .. } = *call;
    let query: Vec<f32> = (past..past + len).flat_map(token).collect();
    let slots: Vec<i32> =
        (past..past + len).map(|p| BLOCKS[p / BLOCK] * BLOCK as i32 + (p % BLOCK) as i32).collect();
    let mut inputs = ort::inputs![
        "query" => Tensor::from_array(([len, WIDTH], query))?,
        "key_cache" => key,
        "value_cache" => value,
        "cumulative_sequence_length" => Tensor::from_array(([2], vec![0, len as i32]))?,
        "past_seqlens" => Tensor::from_array(([1], vec![past as i32]))?,
        "block_table" => Tensor::from_array(([1, 6], BLOCKS.to_vec()))?,
        "cos_cache" => Tensor::from_array(([POSITIONS, DIM / 4], table(f64::cos)))?,
        "sin_cache" => Tensor::from_array(([POSITIONS, DIM / 4], table(f64::sin)))?,
    ];
    if call.slots {
        inputs.push(("slot_mapping".into(), Tensor::from_array(([len], slots))?.into()));
    }
    if call.metadata {
        inputs.push(("attention_metadata".into(), Tensor::from_array(([2], vec![64, 96]))?.into()));
    }
    let outputs = session.run(inputs)?;
    let (shape, rows) = outputs["output"].try_extract_tensor::<f32>()?;
    assert_eq!(**shape, [len as i64, (HEADS * DIM) as i64]);
    Ok(rows.to_vec())
}

fn caches<E: Element>() -> (Tensor<E>, Tensor<E>) {
    let cache = || Tensor::from_array((CACHE, vec![E::of(f32::NAN); CACHE.iter().product()])).unwrap();
    (cache(), cache())
}

/// Plain attention in f64, for the token at `position`.
fn expected(position: usize) -> Vec<f64> {
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    let head = |position: usize, head: usize| -> Vec<f64> {
        let token = token(position);
        let mut x: Vec<f64> = token[head * DIM..(head + 1) * DIM].iter().map(|&x| f64::from(x)).collect();
        if head < HEADS + KV_HEADS {
            for i in 0..DIM / 4 {
                let row = position * DIM / 4 + i;
                let (cos, sin) = (f64::from(cos[row]), f64::from(sin[row]));
                let (a, b) = (x[2 * i], x[2 * i + 1]);
                (x[2 * i], x[2 * i + 1]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
        x
    };
    let group = HEADS / KV_HEADS;
    let mut output = vec![];
    for h in 0..HEADS {
        let query = head(position, h);
        let weights: Vec<f64> = (0..=position)
            .map(|p| {
                let key = head(p, HEADS + h / group);
                let dot: f64 = key.iter().zip(&query).map(|(k, q)| k * q).sum();
                (dot / (DIM as f64).sqrt()).exp()
            })
            .collect();
        let sum: f64 = weights.iter().sum();
        let values: Vec<_> = (0..=position).map(|p| head(p, HEADS + KV_HEADS + h / group)).collect();
        output
            .extend((0..DIM).map(|c| weights.iter().zip(&values).map(|(w, v)| w * v[c]).sum::<f64>() / sum));
    }
    output
}

#[test]
fn a_session_computes_it_in_place_and_alike_in_any_chunks() {
    compute_in_chunks::<f32>();
    compute_in_chunks::<bf16>();
}

fn compute_in_chunks<E: Element>() {
    let mut bits = vec![];
    for (slots, metadata, threads) in [(true, true, 2), (false, false, 1), (true, false, 3)] {
        let has = |name: &str| match name {
            "slot_mapping" => slots,
            "attention_metadata" => metadata,
            _ => true,
        };
        let mut session = session(threads, E::TYPE, &ATTRIBUTES, has).unwrap();
        let (key, value) = caches::<E>();
        let mut rows = vec![];
        let mut past = 0;
        for len in [[40, 1, 0, 30, 1], [1, 1, 50, 19, 1], [71, 1, 0, 0, 0]][threads - 1] {
            rows.extend(run(&mut session, &key, &value, &Call { past, len, slots, metadata }).unwrap());
            past += len;
        }
        for position in [0, 39, 40, 71] {
            let row = &rows[position * HEADS * DIM..];
            for (i, (got, want)) in row.iter().zip(expected(position)).enumerate() {
                let error = (f64::from(*got) - want).abs();
                assert!(error < E::TOLERANCE, "position {position} channel {i}: {got}, not {want}");
            }
        }
        let (_, key) = key.extract_tensor();
        for block in 0..NUM_BLOCKS {
            let written = key[block * BLOCK * KV_HEADS * DIM..][..BLOCK * KV_HEADS * DIM]
                .iter()
                .filter(|x| !x.is_nan())
                .count();
            // Of 72 tokens.
            let place = BLOCKS.iter().position(|&named| named == block as i32);
            let intended = place.map_or(0, |place| 72usize.saturating_sub(place * BLOCK).min(BLOCK));
            assert_eq!(written, intended * KV_HEADS * DIM, "block {block}");
        }
        bits.push(rows.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    }
    assert!(bits.iter().all(|rows| *rows == bits[0]), "chunks or threads change bits");
}

#[test]
fn what_does_not_fit_is_an_error_that_names_it() {
    let mut session = session(1, Type::Float32, &ATTRIBUTES, |name| name != "attention_metadata").unwrap();
    let (key, value) = caches::<f32>();
    // The last position of the table and of the blocks, then one more.
    let mut call = Call { past: 95, len: 1, slots: true, metadata: false };
    run(&mut session, &key, &value, &call).unwrap();
    let narrow = Tensor::from_array(([NUM_BLOCKS, BLOCK, KV_HEADS, DIM / 2], vec![0f32; 6144])).unwrap();
    let refused = run(&mut session, &narrow, &narrow, &call).unwrap_err().to_string();
    assert!(refused.contains("PagedAttention: query: is 320 wide"), "{refused}");
    call.past = i32::MAX as usize;
    call.len = 0;
    run(&mut session, &key, &value, &call).unwrap();
    let refused = run(&mut session, &key, &narrow, &call).unwrap_err().to_string();
    assert!(refused.contains("PagedAttention: value_cache: shape"), "{refused}");
    call.len = 1;
    call.past = 0;
    let refused = run(&mut session, &key, &key, &call).unwrap_err().to_string();
    assert!(refused.contains("key_cache and value_cache are one tensor"), "{refused}");
}

#[test]
fn attributes_that_mean_something_else_are_refused_when_the_session_is_made() {
    for (name, value) in [
        ("local_window_size", Value::Int(128)),
        ("softcap", Value::Float(30.0)),
        ("kv_cache_layout", Value::Text("LATENT")),
    ] {
        let attributes = [&ATTRIBUTES[..], &[(name, value)]].concat();
        let Err(refused) = session(1, Type::Float32, &attributes, |_| true) else {
            panic!("{name} was accepted")
        };
        let refused = refused.to_string();
        assert!(refused.contains(&format!("PagedAttention: {name} is")), "{refused}");
    }
}
