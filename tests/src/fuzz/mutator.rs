//! Owns the making of inputs without coverage: examples, cut, repeated, mixed and damaged.
//!
//! Invariant: the same generator and examples give the same inputs.

use glm_simulator::rng::Rng;

/// Longest input that is made.
const MAX_BYTES: usize = 4096;
/// Most changes of one input.
const MAX_CHANGES: usize = 6;
/// Bytes that mean something in one of the formats, or in UTF-8.
const SPECIAL: &[u8] = b"\0\t\n\r \"'#,.:;=[]{}\\-+019eE\x7f\x80\xbf\xc3\xe2\xef\xf0\xff";

/// A new input, made of `examples`.
pub fn input(rng: &mut Rng, examples: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = pick(rng, examples).to_vec();
    for _ in 0..rng.range(1..=MAX_CHANGES) {
        change(rng, &mut bytes, examples);
        bytes.truncate(MAX_BYTES);
    }
    bytes
}

fn pick<'a>(rng: &mut Rng, examples: &'a [Vec<u8>]) -> &'a [u8] {
    if examples.is_empty() { &[] } else { &examples[rng.range(0..=examples.len() - 1)] }
}

fn change(rng: &mut Rng, bytes: &mut Vec<u8>, examples: &[Vec<u8>]) {
    let at = rng.range(0..=bytes.len());
    let length = rng.range(0..=(bytes.len() - at).min(64));
    match rng.range(0..=6) {
        0 => drop(bytes.drain(at..at + length)),
        1 => {
            let copy = bytes[at..at + length].to_vec();
            let to = rng.range(0..=bytes.len());
            drop(bytes.splice(to..to, copy));
        }
        2 if at < bytes.len() => bytes[at] ^= 1 << rng.range(0..=7),
        3 => bytes.insert(at, SPECIAL[rng.range(0..=SPECIAL.len() - 1)]),
        4 => {
            let other = pick(rng, examples);
            let from = rng.range(0..=other.len());
            let to = rng.range(from..=other.len().min(from + 64));
            drop(bytes.splice(at..at + length, other[from..to].iter().copied()));
        }
        5 => {
            let byte = SPECIAL[rng.range(0..=SPECIAL.len() - 1)];
            let count = rng.range(1..=200);
            drop(bytes.splice(at..at, std::iter::repeat_n(byte, count)));
        }
        _ => bytes.truncate(at),
    }
}
