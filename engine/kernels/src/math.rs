//! Owns the arithmetic that both operators share: the exponential.
//!
//! Invariant: each product and sum is rounded as written, in one rounding where it says `mul_add`, so that the scalar
//! and the vector code agree bit by bit on every instruction set.

/// Below this the result would leave the normal numbers, and is 0.
pub(crate) const LIMIT: f32 = -87.0;
/// Adding 1.5 * 2^23 leaves a float's nearest integer in the low bits of its pattern.
pub(crate) const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has so few bits that its multiples are exact.
pub(crate) const LN_2_HIGH: f32 = 0.693_359_4;
pub(crate) const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Of the polynomial p in exp(r) = 1 + r + r^2 p(r), for |r| <= ln(2)/2, highest power first (Cephes).
pub(crate) const COEFFICIENTS: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];

/// exp(x) for x <= 0; 0 below -87. Attention has the same in vectors.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let z = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = z - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let mut p = COEFFICIENTS[0];
    for c in &COEFFICIENTS[1..] {
        p = p.mul_add(r, *c);
    }
    let y = (p * r).mul_add(r, r) + 1.0;
    let scaled = f32::from_bits(y.to_bits().wrapping_add(z.to_bits() << 23));
    // NaN is not below, and stays.
    if x < LIMIT { 0.0 } else { scaled }
}
