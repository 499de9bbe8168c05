//! Owns the exponential of the softmax.
//!
//! Invariant: `exp(0)` is exactly 1, so folding in a tile that a row does not see changes no bit.

use super::lanes::Lanes;
use crate::math::{COEFFICIENTS, LIMIT, LN_2_HIGH, LN_2_LOW, ROUND};

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
    use crate::paged_attention::simd::portable::Floats;

    #[test]
    fn the_scalar_exponential_has_the_same_bits() {
        for step in 0..=880_000 {
            let x = -(step as f32) * 1e-4;
            let (vector, scalar) = (exp(Floats::<1>, [x])[0], crate::math::exp(x));
            assert_eq!(vector.to_bits(), scalar.to_bits(), "{x}");
        }
    }

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
