//! Owns what a cache stores of a number: float32 as it is, or bfloat16, which halves the bytes that a
//! decode reads.
//!
//! Invariant: an element widens to exactly the number that it stands for, at every level, so only
//! writing rounds.

use half::bf16;
use ort::value::{PrimitiveTensorElementType, TensorElementType};

use super::lanes::Lanes;

/// A number in a cache.
pub(super) trait Element: PrimitiveTensorElementType + Copy + Send + Sync + 'static {
    /// ONNX Runtime's name of it.
    const TYPE: TensorElementType;

    /// The nearest element.
    fn round(x: f32) -> Self;

    /// A vector of neighbouring elements.
    ///
    /// # Safety
    /// `from` is valid for reading `L::NUM` elements.
    unsafe fn load<L: Lanes>(lanes: L, from: *const Self) -> L::Vector;
}

impl Element for f32 {
    const TYPE: TensorElementType = TensorElementType::Float32;

    #[inline(always)]
    fn round(x: f32) -> Self {
        x
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, from: *const Self) -> L::Vector {
        // SAFETY: the caller vouches for it.
        unsafe { lanes.load(from) }
    }
}

impl Element for bf16 {
    const TYPE: TensorElementType = TensorElementType::Bfloat16;

    #[inline(always)]
    fn round(x: f32) -> Self {
        // To the nearest, ties to even; `bf16::from_f32` does the same with more branches.
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        Self::from_bits(if x.is_nan() { 0x7fc0 } else { (rounded >> 16) as u16 })
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, from: *const Self) -> L::Vector {
        // SAFETY: the caller vouches for it; a bf16 is 16 bits.
        unsafe { lanes.widen(from.cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_the_nearest_and_survives_extremes() {
        let samples = (0..1u32 << 16).map(|i| f32::from_bits(i.wrapping_mul(65_521 * 17)));
        for x in samples.chain([0.0, -0.0, f32::INFINITY, f32::MIN_POSITIVE, f32::NAN, f32::MAX]) {
            let (found, expected) = (<bf16 as Element>::round(x), bf16::from_f32(x));
            assert!(found == expected || found.is_nan() && expected.is_nan(), "{x}: {found} not {expected}");
        }
    }
}
