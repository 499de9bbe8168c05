//! Owns the exponential of the softmax.
//!
//! Invariant: `exp(0)` is exactly 1, so folding in a tile that a row does not see changes no bit.

use super::simd::Lanes;

/// Below this the result would leave the normal numbers, and is 0.
pub(in crate::operators) const LIMIT: f32 = -87.0;
/// Adding 1.5 * 2^23 leaves a float's nearest integer in the low bits of its pattern.
pub(in crate::operators) const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has so few bits that its multiples are exact.
pub(in crate::operators) const LN_2_HIGH: f32 = 0.693_359_4;
pub(in crate::operators) const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Of the polynomial p in exp(r) = 1 + r + r^2 p(r), for |r| <= ln(2)/2, highest power first (Cephes).
pub(in crate::operators) const COEFFICIENTS: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];

/// `exp(x)` for `x <= 0`, to about 1 unit in the last place; 0 below -87.
#[inline(always)]
pub(super) fn exp<L: Lanes>(lanes: L, x: L::Vector) -> L::Vector {
    let round = lanes.splat(ROUND);
    let z = lanes.mul_add(x, lanes.splat(std::f32::consts::LOG2_E), round);
    let n = lanes.sub(z, round);
    let r = lanes.mul_add(n, lanes.splat(-LN_2_HIGH), x);
    let r = lanes.mul_add(n, lanes.splat(-LN_2_LOW), r);
    let mut p = lanes.splat(COEFFICIENTS[0]);
    for c in &COEFFICIENTS[1..] {
        p = lanes.mul_add(p, r, lanes.splat(*c));
    }
    let y = lanes.add(lanes.mul_add(lanes.mul(p, r), r, r), lanes.splat(1.0));
    lanes.zero_below(x, lanes.splat(LIMIT), lanes.add_exponent(y, z))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operators::paged_attention::simd::portable::Floats;

    #[test]
    fn it_is_accurate_and_exact_at_zero() {
        assert_eq!(exp(Floats::<1>, [0.0])[0].to_bits(), 1f32.to_bits());
        assert_eq!(exp(Floats::<1>, [-0.0])[0].to_bits(), 1f32.to_bits());
        for hidden in [-87.1, -1e30, f32::MIN] {
            assert_eq!(exp(Floats::<1>, [hidden])[0].to_bits(), 0);
        }
        let mut worst = 0f64;
        for step in 0..=870_000 {
            let x = -(step as f32) * 1e-4;
            let (got, want) = (f64::from(exp(Floats::<1>, [x])[0]), f64::from(x).exp());
            worst = worst.max((got - want).abs() / (want * f64::from(f32::EPSILON)));
        }
        assert!(worst < 2.0, "off by {worst} units in the last place");
    }
}
