//! Owns activations as whole numbers: for each row and block of K, int8 values and one scale.
//!
//! Invariant: a row's values depend on that row only, and are the same to the bit in every instruction
//! set: each step is one IEEE operation or one of whole numbers. A block that holds NaN or infinity, or
//! comes near it, has the scale NaN, so what it touches is NaN and nothing hides.

use std::ops::Range;

use super::norm::Norm;
use super::packing::{LINE, STEP};

/// Adding 1.5 * 2^23 rounds to the nearest whole number, ties to even, and leaves it in the low bits.
const ROUND: f32 = 12_582_912.0;
/// The largest value.
const TOP: f32 = 127.0;
/// Blocks whose largest magnitude is below this are 0: the product of their scale with that of a weight, and
/// with a sixteenth of it, is then never subnormal, so kernels may move powers of 2 from one to the other.
const LEAST: f32 = 1e-20;
/// Blocks whose largest magnitude is above this count as infinite: else that product might be so, and a
/// sixteenth of it not.
const MOST: f32 = 1e35;

/// Values of a strip, about: as many as are worth a thread's while.
const STRIP_VALUES: usize = 8192;
/// The width of a strip is a multiple of any block and line.
const STRIP_STEP: usize = 512;

/// 64 values of a row, as words of 4.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Values(pub(super) [i32; LINE / STEP]);

/// What goes with the values of a row in a block.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct RowBlock {
    /// The values' sum times -8: what codes of 4 bits are too large by.
    pub(super) offset_4: i32,
    /// The values' sum times -128: for codes of 8 bits, and for codes of 4 times 16.
    pub(super) offset_8: i32,
    /// What a value stands for.
    pub(super) scale: f32,
}

/// Rows that are multiplied together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    /// Its first row.
    pub(super) first: usize,
    /// Rows of it.
    pub(super) rows: usize,
    /// Rows that it has room for.
    height: usize,
    /// Rows that all tiles before it have room for.
    offset: usize,
}

/// A tile's values, `[k / 64][height]`, the last of them filled up with zeros, and what goes with them,
/// `[k / block_size][height]`.
#[derive(Clone, Copy, Default)]
pub(super) struct TileValues<'a> {
    /// Rows of the tile; what is in the place of others has no meaning.
    pub(super) rows: usize,
    /// Rows that it has room for.
    pub(super) height: usize,
    pub(super) values: &'a [Values],
    pub(super) blocks: &'a [RowBlock],
}

/// Quantised rows, kept between calls: memory only grows.
#[derive(Default)]
pub(super) struct Activations {
    tiles: Vec<Tile>,
    values: Vec<Values>,
    blocks: Vec<RowBlock>,
}

impl Activations {
    /// Makes room for `heights` (rows, and room for rows, of each tile) of as many values, in blocks of as
    /// many, as each of `shapes` says. Threads get access for each of them: to write strips, and then to read
    /// tiles. They share the memory, so they are used one after the other.
    pub(super) fn share<const NUM: usize>(
        &mut self,
        heights: impl Iterator<Item = (usize, usize)>,
        shapes: [(usize, usize); NUM],
    ) -> [Shared<'_>; NUM] {
        self.tiles.clear();
        let (mut first, mut offset) = (0, 0);
        for (rows, height) in heights {
            self.tiles.push(Tile { first, rows, height, offset });
            (first, offset) = (first + rows, offset + height);
        }
        let grow = |have: usize, stride: usize| (offset * stride).max(have);
        for (k, block_size) in shapes {
            self.values.resize(grow(self.values.len(), k.div_ceil(LINE)), Values([0; LINE / STEP]));
            let none = RowBlock { offset_4: 0, offset_8: 0, scale: 0.0 };
            self.blocks.resize(grow(self.blocks.len(), k / block_size), none);
        }
        let height = self.tiles.first().map_or(1, |tile| tile.height);
        shapes.map(|(k, block_size)| Shared {
            values: self.values.as_mut_ptr(),
            blocks: self.blocks.as_mut_ptr(),
            tiles: &self.tiles,
            k,
            block_size,
            strip_width: (STRIP_VALUES / height).next_multiple_of(STRIP_STEP),
        })
    }
}

/// Hands content out to threads.
pub(super) struct Shared<'a> {
    values: *mut Values,
    blocks: *mut RowBlock,
    tiles: &'a [Tile],
    k: usize,
    block_size: usize,
    /// Values along K of a strip.
    strip_width: usize,
}

// SAFETY: the pointers are to vectors that `share` borrowed exclusively, and threads only get what the
// functions below give, whose callers vouch for them.
unsafe impl Sync for Shared<'_> {}

impl Shared<'_> {
    /// The tiles of the call.
    pub(super) fn tiles(&self) -> &[Tile] {
        self.tiles
    }

    /// Strips of all tiles.
    pub(super) fn num_strips(&self) -> usize {
        self.tiles.len() * self.k.div_ceil(self.strip_width)
    }

    /// Strip `i`, to be written.
    ///
    /// # Safety
    /// Nobody else has it, nor any tile, nor anything of another shape's.
    pub(super) unsafe fn strip(&self, i: usize) -> Strip<'_> {
        let strips_per_tile = self.k.div_ceil(self.strip_width);
        let (tile, start) = (self.tiles[i / strips_per_tile], i % strips_per_tile * self.strip_width);
        let end = (start + self.strip_width).min(self.k);
        // SAFETY: `share` made room for every tile, one after the other, and strips end at whole steps, so
        // no two share a line or a block. The caller vouches that none is given out twice.
        let (values, blocks) = unsafe {
            let [values, blocks] = self.range(tile, start, end);
            (
                std::slice::from_raw_parts_mut(self.values.add(values.start), values.len()),
                std::slice::from_raw_parts_mut(self.blocks.add(blocks.start), blocks.len()),
            )
        };
        Strip { tile, start, end, k: self.k, block_size: self.block_size, values, blocks }
    }

    /// The content of a tile of the call.
    ///
    /// # Safety
    /// It is a tile of this call, its strips are written, nobody has one of them any more, and nothing of
    /// another shape was written since.
    pub(super) unsafe fn tile(&self, tile: Tile) -> TileValues<'_> {
        let [values, blocks] = self.range(tile, 0, self.k);
        // SAFETY: `share` made room for the tile; the caller vouches that it is only read by now.
        unsafe {
            TileValues {
                rows: tile.rows,
                height: tile.height,
                values: std::slice::from_raw_parts(self.values.add(values.start), values.len()),
                blocks: std::slice::from_raw_parts(self.blocks.add(blocks.start), blocks.len()),
            }
        }
    }

    /// Where the values from `start` to `end` of K lie, and what goes with them; `start` is a whole number
    /// of steps, and so is `end` unless it is that of K.
    fn range(&self, tile: Tile, start: usize, end: usize) -> [Range<usize>; 2] {
        let place = |per_row: usize, start: usize, end: usize| {
            let first = tile.offset * per_row;
            first + start * tile.height..first + end * tile.height
        };
        [
            place(self.k.div_ceil(LINE), start / LINE, end.div_ceil(LINE)),
            place(self.k / self.block_size, start / self.block_size, end / self.block_size),
        ]
    }
}

/// Some of a tile's columns, to be written.
pub(super) struct Strip<'a> {
    tile: Tile,
    start: usize,
    end: usize,
    k: usize,
    block_size: usize,
    values: &'a mut [Values],
    blocks: &'a mut [RowBlock],
}

impl Strip<'_> {
    /// Quantises the strip's part of `x`, `[rows, k]`, after the norm if there is one. Inlined where a level
    /// compiles it.
    #[inline(always)]
    pub(super) fn quantise(&mut self, x: &[f32], norm: Option<&Norm>) {
        let rows = &x[self.tile.first * self.k..(self.tile.first + self.tile.rows) * self.k];
        for (r, row) in rows.chunks_exact(self.k).enumerate() {
            let factors = norm.map(|norm| (norm.factor(row), &norm.weight[self.start..self.end]));
            let row = &row[self.start..self.end];
            match self.block_size {
                32 => self.quantise_row::<32>(r, row, factors),
                64 => self.quantise_row::<64>(r, row, factors),
                128 => self.quantise_row::<128>(r, row, factors),
                256 => self.quantise_row::<256>(r, row, factors),
                _ => self.quantise_row::<512>(r, row, factors),
            }
        }
    }

    #[inline(always)]
    fn quantise_row<const B: usize>(&mut self, r: usize, row: &[f32], factors: Option<(f32, &[f32])>) {
        let height = self.tile.height;
        for (i, block) in row.as_chunks::<B>().0.iter().enumerate() {
            let mut block = *block;
            if let Some((factor, weight)) = factors {
                for (x, weight) in block.iter_mut().zip(&weight.as_chunks::<B>().0[i]) {
                    *x = *x * factor * weight;
                }
            }
            let mut values = [0; B];
            self.blocks[i * height + r] = quantise_block(&block, &mut values);
            // In words, since that is how kernels read them.
            for (w, word) in values.as_chunks::<32>().0.iter().enumerate() {
                let at = i * B + w * 32;
                let line = &mut self.values[at / LINE * height + r].0;
                let words = &mut line[at % LINE / STEP..][..32 / STEP];
                for (to, from) in words.iter_mut().zip(word.as_chunks::<STEP>().0) {
                    *to = i32::from_ne_bytes(from.map(i8::cast_unsigned));
                }
            }
        }
        if !row.len().is_multiple_of(LINE) {
            self.values[row.len() / LINE * height + r].0[LINE / STEP / 2..].fill(0);
        }
    }
}

#[inline(always)]
fn quantise_block<const B: usize>(x: &[f32; B], values: &mut [i8; B]) -> RowBlock {
    // As patterns without the sign, numbers are in order, and infinity and NaN are above them all.
    let mut top = 0;
    for x in x {
        top = top.max((x.to_bits() & 0x7fff_ffff).cast_signed());
    }
    let top = f32::from_bits(top.cast_unsigned());
    let (factor, scale) = match top {
        LEAST..=MOST => (TOP / top, top / TOP),
        _ if top < LEAST => (0.0, 0.0),
        _ => (0.0, f32::NAN),
    };
    let mut sum = 0;
    for (x, value) in x.iter().zip(values) {
        // A product with NaN or infinity is neither here nor there: the scale is NaN.
        *value = (x * factor + ROUND).to_bits() as i8;
        sum += i32::from(*value);
    }
    RowBlock { offset_4: -8 * sum, offset_8: -128 * sum, scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(x: [f32; 32]) -> (RowBlock, [i8; 32]) {
        let mut values = [0; 32];
        (quantise_block(&x, &mut values), values)
    }

    #[test]
    fn values_are_the_nearest_of_127_steps() {
        let x: [f32; 32] = std::array::from_fn(|i| (i as f32 - 20.0) * 0.31);
        let (about, values) = block(x);
        assert_eq!(about.scale, 20.0 * 0.31 / 127.0);
        for (x, value) in x.iter().zip(values) {
            assert!((f32::from(value) * about.scale - x).abs() <= about.scale * 0.5001);
        }
        let sum: i32 = values.iter().map(|&value| i32::from(value)).sum();
        assert_eq!((about.offset_4, about.offset_8), (-8 * sum, -128 * sum));
        assert_eq!(values[0], -127);
    }

    #[test]
    fn what_is_not_finite_makes_the_scale_nan_and_what_is_tiny_is_nothing() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            let mut x = [1.0; 32];
            x[17] = bad;
            assert!(block(x).0.scale.is_nan());
        }
        for small in [0.0, -0.0, 1e-21, f32::MIN_POSITIVE / 8.0] {
            let (about, values) = block([small; 32]);
            assert_eq!((about.scale, values), (0.0, [0; 32]));
        }
        let (about, values) = block([MOST; 32]);
        assert_eq!((about.scale, values), (MOST / 127.0, [127; 32]));
    }
}
