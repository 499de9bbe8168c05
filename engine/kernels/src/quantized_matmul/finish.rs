//! Owns what happens between a product's sums and the output: units, bias, epilogue, what is added.
//!
//! Invariant: plain Rust, which rounds each operation as written, so that every instruction set it is
//! compiled for gives the same bits.

use super::packing::{COLUMNS, HALF};
use crate::math::exp;

/// What is done to a panel's sums.
#[derive(Clone, Copy)]
pub(super) struct Finish<'a> {
    /// Bits of a code.
    pub(super) bits: usize,
    /// Added to each column.
    pub(super) bias: Option<&'a [f32; COLUMNS]>,
    /// Whether the output is silu(columns below 16) * the other columns.
    pub(super) swiglu: bool,
}

/// A row of the output, and what is added to it.
pub(super) type OutputRow<'a> = (&'a mut [f32], Option<&'a [f32]>);

/// Writes the rows of `sums` to `outputs`; those of a last panel may be shorter than the panel.
#[inline(always)]
pub(super) fn finish<'a>(
    sums: &mut [[f32; COLUMNS]],
    what: &Finish,
    outputs: impl Iterator<Item = OutputRow<'a>>,
) {
    // See the kernel: at 4 bits the second half's sums are 16 times too large.
    let unit = if what.bits == 4 { 1.0 / 16.0 } else { 1.0 };
    for (sums, (output, addend)) in sums.iter_mut().zip(outputs) {
        for sum in &mut sums[HALF..] {
            *sum *= unit;
        }
        if let Some(bias) = what.bias {
            for (sum, bias) in sums.iter_mut().zip(bias) {
                *sum += bias;
            }
        }
        if what.swiglu {
            let (gates, ups) = sums.split_at_mut(HALF);
            for (gate, up) in gates.iter_mut().zip(ups) {
                *gate = silu(*gate) * *up;
            }
        }
        if let Some(addend) = addend {
            for (sum, addend) in sums.iter_mut().zip(addend) {
                *sum += addend;
            }
        }
        // Copies of known length are a few instructions.
        if let Ok(output) = <&mut [f32; COLUMNS]>::try_from(&mut *output) {
            *output = *sums;
        } else if let Ok(output) = <&mut [f32; HALF]>::try_from(&mut *output) {
            output.copy_from_slice(&sums[..HALF]);
        } else {
            output.copy_from_slice(&sums[..output.len()]);
        }
    }
}

/// x / (1 + exp(-x)).
#[inline(always)]
fn silu(x: f32) -> f32 {
    let e = exp(-x.abs());
    let numerator = if x < 0.0 { x * e } else { x };
    numerator / (1.0 + e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silu_is_accurate_and_keeps_nan() {
        for step in -120_000..=120_000 {
            let x = step as f32 * 1e-3;
            let exact = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            let got = f64::from(silu(x));
            assert!((got - exact).abs() <= 4e-7 * exact.abs() + 1e-35, "silu({x}) is {got}, not {exact}");
        }
        assert!(silu(f32::NAN).is_nan());
        assert_eq!(silu(f32::INFINITY), f32::INFINITY);
        assert_eq!(silu(-0.0), 0.0);
    }
}
