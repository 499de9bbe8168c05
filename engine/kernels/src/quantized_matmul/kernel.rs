//! Owns the inner loops: a tile of rows times a panel of 32 columns, over all of K.
//!
//! Invariant: an output is one chain of operations in a fixed order: an exact sum of whole numbers for
//! each block, then `sum = fma(block's sum, weight scale * row scale, sum)` over the blocks. So its bits
//! depend neither on the rows that are computed beside it nor on the instruction set.

use super::activations::{RowBlock, TileValues};
use super::packing::{COLUMNS, Format, HALF, LINE, Line, STEP};

/// Vectors of whole numbers for `NUM` columns. The value stands for the proof that this CPU can compute
/// with them, so arithmetic is safe to call. All functions are to be inlined into a function that is
/// compiled for the instruction set.
pub(super) trait Lanes: Copy {
    /// Columns of a vector.
    const NUM: usize;
    /// Codes of 4 k of each column.
    type Codes: Copy;
    /// One sum a column.
    type Sums: Copy;

    /// What a block's sums of a row start at, for columns below 16 and for the others.
    fn start<const BITS: usize>(self, row: &RowBlock) -> [Self::Sums; 2];
    /// The codes of vector `v` (of columns below 16, and of the others) out of a step's lines.
    fn codes<const BITS: usize>(self, step: &[Line], v: usize) -> [Self::Codes; 2];
    /// `sums` plus the products of 4 k with a row's values, which are the bytes of `x`.
    fn dot<const BITS: usize>(self, sums: Self::Sums, codes: Self::Codes, x: i32) -> Self::Sums;
    /// `to = fma(sums, scales * row, to)` with float16 scales. At 4 bits `sums` of columns from 16 on
    /// (`second`) enter 16 times as large as they are.
    fn fold<const BITS: usize>(self, second: bool, sums: Self::Sums, scales: &[u8], row: f32, to: &mut [f32]);
    /// Asks for the line `ahead` bytes after this one.
    fn prefetch(self, line: &Line, ahead: usize);
}

/// A panel, and how far ahead of it the next bytes lie that will be needed.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    pub(super) lines: &'a [Line],
    pub(super) format: Format,
    pub(super) ahead: usize,
}

/// Words of a row, of 4 values each, that are multiplied before the next part of its block.
const WORDS: usize = LINE / STEP / 2;

/// Adds up the tile's rows times the panel's columns.
#[allow(clippy::needless_range_loop, reason = "rows and halves index several arrays")]
#[inline(always)]
pub(super) fn multiply<L: Lanes, const BITS: usize, const ROWS: usize>(
    lanes: L,
    panel: &Panel,
    tile: &TileValues,
    sums: &mut [[f32; COLUMNS]],
) {
    let sums: &mut [[f32; COLUMNS]; ROWS] = (&mut sums[..ROWS]).try_into().expect("a sum for each row");
    for row in sums.iter_mut() {
        row.fill(0.0);
    }
    let (values, rows) = (tile.values.as_chunks::<ROWS>().0, tile.blocks.as_chunks::<ROWS>().0);
    let parts = panel.format.block_size / STEP / WORDS;
    for (b, (block, rows)) in panel.lines.chunks_exact(panel.format.block_lines()).zip(rows).enumerate() {
        let Some((scales, block)) = block.split_last() else { break };
        for v in 0..HALF / L::NUM {
            let mut block_sums = [lanes.start::<BITS>(&rows[0]); ROWS];
            for r in 1..ROWS {
                block_sums[r] = lanes.start::<BITS>(&rows[r]);
            }
            for (i, lines) in block.chunks_exact(WORDS * BITS / 4).enumerate() {
                let at = b * parts + i;
                // An array of known length, so that no index into it is checked.
                let words: [&[i32; WORDS]; ROWS] =
                    std::array::from_fn(|r| &values[at / 2][r].0.as_chunks().0[at % 2]);
                for s in 0..WORDS {
                    let step = &lines[s * BITS / 4..(s + 1) * BITS / 4];
                    if v == 0 {
                        for line in step {
                            lanes.prefetch(line, panel.ahead);
                        }
                    }
                    let codes = lanes.codes::<BITS>(step, v);
                    for r in 0..ROWS {
                        for half in 0..2 {
                            let x = &words[r][s];
                            block_sums[r][half] = lanes.dot::<BITS>(block_sums[r][half], codes[half], *x);
                        }
                    }
                }
            }
            for half in 0..2 {
                let column = half * HALF + v * L::NUM;
                let scales = &scales[2 * column..2 * (column + L::NUM)];
                for r in 0..ROWS {
                    let to = &mut sums[r][column..column + L::NUM];
                    lanes.fold::<BITS>(half == 1, block_sums[r][half], scales, rows[r].scale, to);
                }
            }
        }
    }
}

/// Calls [`multiply`] for a number of rows that is known when it runs; none but those listed.
macro_rules! multiply_rows {
    ($kernel:ident, $rows:expr, $bits:expr, $arguments:tt, [$($num:literal)*]) => {
        match ($rows, $bits) {
            $(
                ($num, 4) => $kernel::<4, $num> $arguments,
                ($num, _) => $kernel::<8, $num> $arguments,
            )*
            _ => unreachable!("no tile is that high"),
        }
    };
}
pub(super) use multiply_rows;
