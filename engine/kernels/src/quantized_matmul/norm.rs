//! Owns RMSNorm as the first step of a product: rows are normed as they become whole numbers.
//!
//! Invariant: squares are added up in one order, whatever the instruction set and the rows beside; a row whose
//! squares are no number, or too large for one, becomes NaN, and nothing hides.

/// Squares are added up in so many sums: what a few registers hold.
const SUMS: usize = 32;

/// A norm's weights, and what keeps it from dividing by zero.
#[derive(Debug, Clone, Copy)]
pub(super) struct Norm<'a> {
    /// `[k]`.
    pub(super) weight: &'a [f32],
    pub(super) epsilon: f32,
}

impl Norm<'_> {
    /// What a whole row's values are multiplied by, and then by their weights. Its length is a multiple of 32.
    #[inline(always)]
    pub(super) fn factor(&self, row: &[f32]) -> f32 {
        let mut sums = [0.0; SUMS];
        for part in row.as_chunks::<SUMS>().0 {
            for (sum, x) in sums.iter_mut().zip(part) {
                *sum += x * x;
            }
        }
        let mut len = SUMS;
        while len > 1 {
            len /= 2;
            for i in 0..len {
                sums[i] += sums[i + len];
            }
        }
        let mean = sums[0] / row.len() as f32;
        if mean.is_finite() { 1.0 / (mean + self.epsilon).sqrt() } else { f32::NAN }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_those_of_float64_and_nothing_hides() {
        let row: Vec<f32> = (0..1024).map(|i| (i * 37 % 101) as f32 * 0.03 - 1.3).collect();
        let norm = Norm { weight: &[], epsilon: 1e-5 };
        let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let want = 1.0 / (squares / 1024.0 + 1e-5).sqrt();
        assert!((f64::from(norm.factor(&row)) - want).abs() < 2e-7 * want);
        assert_eq!(norm.factor(&[0.0; 64]), 1.0 / 1e-5f32.sqrt());
        for bad in [f32::NAN, f32::INFINITY, 1e20] {
            let mut row = row.clone();
            row[700] = bad;
            assert!(norm.factor(&row).is_nan(), "{bad}");
        }
    }
}
