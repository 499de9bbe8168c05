//! Owns the passes over a whole vocabulary: few, and written so that they vectorise.
//!
//! Invariant: every lane rounds alike whatever its width, so the instruction set never changes a bit.

/// Weights that are summed and compared together.
pub(super) const CHUNK: usize = 64;

/// What stands for the weights of a chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk {
    pub(super) max: f32,
    pub(super) sum: f64,
}

/// The largest value of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Best {
    /// Index of the first one.
    pub(super) id: u32,
    pub(super) value: f32,
    /// Whether all values are finite.
    pub(super) is_finite: bool,
}

/// Defines a function that runs with AVX2 where the CPU has it.
macro_rules! vectorised {
    ($(#[$doc:meta])* $name:ident = $portable:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?) => {
        $(#[$doc])*
        pub(super) fn $name($($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn with_avx2($($argument: $type),*) $(-> $result)? {
                    $portable($($argument),*)
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the CPU has AVX2.
                    return unsafe { with_avx2($($argument),*) };
                }
            }
            $portable($($argument),*)
        }
    };
}

vectorised! {
    /// The first largest value, and whether all are finite, in one pass.
    best = best_portable(row: &[f32]) -> Best
}

vectorised! {
    /// Weights `exp((logit - max) * scale)`, and what stands for each chunk of them.
    weigh = weigh_portable(
        logits: &[f32],
        max: f32,
        scale: f32,
        weights: &mut Vec<f32>,
        chunks: &mut Vec<Chunk>
    )
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Asks for what lies 4 KiB ahead: another core has just written half of it.
#[inline(always)]
fn prefetch(at: &[f32; 16]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        const AHEAD: usize = 1024;
        // SAFETY: prefetching is part of the baseline and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.as_ptr().wrapping_add(AHEAD).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[inline(always)]
fn best_portable(row: &[f32]) -> Best {
    /// Values that are searched again for the index of the largest.
    const PART: usize = 1024;
    let mut max = f32::NEG_INFINITY;
    let mut at = 0;
    // 0 as long as all are finite: infinity times 0 is no number.
    let mut sink = [0f32; 16];
    for (index, part) in row.chunks(PART).enumerate() {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let (vectors, tail) = part.as_chunks::<16>();
        for vector in vectors {
            prefetch(vector);
            for ((lane, sink), &value) in lanes.iter_mut().zip(&mut sink).zip(vector) {
                *lane = larger(*lane, value);
                *sink += value * 0.0;
            }
        }
        for &value in tail {
            lanes[0] = larger(lanes[0], value);
            sink[0] += value * 0.0;
        }
        let found = lanes.into_iter().fold(f32::NEG_INFINITY, larger);
        if found > max {
            (max, at) = (found, index * PART);
        }
    }
    let place = row[at..].iter().position(|&value| value == max).unwrap_or(0);
    let is_finite = sink.iter().all(|lane| !lane.is_nan());
    Best { id: (at + place) as u32, value: max, is_finite }
}

#[inline(always)]
fn weigh_portable(logits: &[f32], max: f32, scale: f32, weights: &mut Vec<f32>, chunks: &mut Vec<Chunk>) {
    weights.resize(logits.len(), 0.0);
    chunks.clear();
    for (logits, weights) in logits.chunks(CHUNK).zip(weights.chunks_mut(CHUNK)) {
        for (weight, &logit) in weights.iter_mut().zip(logits) {
            *weight = exp((logit - max) * scale);
        }
        let mut most = [0f32; 8];
        let mut sums = [0f64; 8];
        let (vectors, tail) = weights.as_chunks::<8>();
        for vector in vectors {
            for ((most, sum), &weight) in most.iter_mut().zip(&mut sums).zip(vector) {
                *most = larger(*most, weight);
                *sum += f64::from(weight);
            }
        }
        for &weight in tail {
            most[0] = larger(most[0], weight);
            sums[0] += f64::from(weight);
        }
        chunks.push(Chunk { max: most.into_iter().fold(0.0, larger), sum: sums.into_iter().sum() });
    }
}

/// `exp(x)` for `x <= 0`, to about 2e-7 of itself and without branches, so that a loop over a
/// vocabulary vectorises; 0 below -87. Cody-Waite reduction and Cephes' polynomial.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding 1.5 * 2^23 rounds to an integer, and leaves that in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (clamped - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = p * r + c;
    }
    let two_to_n = f32::from_bits(rounded.to_bits().wrapping_sub(ROUND.to_bits() - 127) << 23);
    let y = ((p * r) * r + r + 1.0) * two_to_n;
    if x < -87.0 { 0.0 } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_accurate() {
        for step in 0..87_000 {
            let x = -(step as f32) / 1000.0;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() < 3e-7, "exp({x}) = {found}, not {expected}");
        }
        assert_eq!((exp(0.0), exp(-87.1), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn the_best_is_the_first_largest_wherever_it_is() {
        let mut row: Vec<f32> = (0..3001).map(|i| -((i * 7919 % 1000) as f32)).collect();
        for at in [3000, 2999, 1500, 1024, 1023, 16, 15, 0] {
            row[at] = 5.0;
            let found = Best { id: at as u32, value: 5.0, is_finite: true };
            assert_eq!(best(&row), found, "the later ones are equal");
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let kept = std::mem::replace(&mut row[at], bad);
                assert!(!best(&row).is_finite, "{bad} at {at}");
                row[at] = kept;
            }
        }
    }

    #[test]
    fn the_instruction_set_changes_no_bit() {
        for len in [1, 7, 64, 65, 1000] {
            let row: Vec<f32> = (0..len).map(|i| (i * 7919 % 1013) as f32 / 37.0 - 30.0).collect();
            assert_eq!(best(&row), best_portable(&row));
            let max = best(&row).value;
            let (mut weights, mut chunks) = (Vec::new(), Vec::new());
            weigh(&row, max, 1.25, &mut weights, &mut chunks);
            let (mut plain, mut plain_chunks) = (Vec::new(), Vec::new());
            weigh_portable(&row, max, 1.25, &mut plain, &mut plain_chunks);
            let bits = |weights: &[f32]| weights.iter().map(|weight| weight.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&weights), bits(&plain));
            for (chunk, (plain, weights)) in chunks.iter().zip(plain_chunks.iter().zip(plain.chunks(CHUNK))) {
                assert_eq!((chunk.max, chunk.sum.to_bits()), (plain.max, plain.sum.to_bits()));
                let sum: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
                assert!((sum - chunk.sum).abs() < 1e-12 && weights.contains(&chunk.max));
            }
        }
    }
}
