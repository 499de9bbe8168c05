//! Owns how many rows captured steps have: a step of fewer is padded.
//!
//! Invariant: from 16 rows on a bucket is at most half as large again as the one before, so that padding costs little
//! where rows cost much.

/// Rows of each bucket.
pub(in crate::runner::ort) const ROWS: [usize; 15] =
    [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512];
/// The most rows that a captured step has.
pub(in crate::runner::ort) const MAX_ROWS: usize = ROWS[ROWS.len() - 1];

/// The smallest bucket with so many rows.
pub(in crate::runner::ort) fn bucket(num_rows: usize) -> Option<usize> {
    let bucket = ROWS.partition_point(|&rows| rows < num_rows);
    (num_rows > 0 && bucket < ROWS.len()).then_some(bucket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_goes_to_the_smallest_bucket_that_holds_it() {
        let rows = |num_rows| bucket(num_rows).map(|bucket| ROWS[bucket]);
        assert_eq!([1, 2, 3, 17, 24, 25, 200, 512].map(rows), [1, 2, 4, 24, 24, 32, 256, 512].map(Some));
        assert_eq!([0, 513].map(rows), [None, None]);
        assert!(
            ROWS.windows(2).all(|pair| pair[1] <= if pair[0] < 16 { 2 * pair[0] } else { pair[0] * 3 / 2 })
        );
    }
}
