//! Owns activations as whole numbers: for each row and block of K, int8 values and one scale.
//!
//! Invariant: a row's values depend on that row only, and are the same to the bit in every instruction
//! set: each step is one IEEE operation or one of whole numbers. A block that holds NaN or infinity has
//! the scale NaN, so what it touches is NaN and nothing hides.

use super::packing::{LINE, STEP};

/// Adding 1.5 * 2^23 rounds to the nearest whole number, ties to even, and leaves it in the low bits.
const ROUND: f32 = 12_582_912.0;
/// The largest value.
const TOP: f32 = 127.0;
/// Blocks whose largest magnitude is below this are 0: 127 divided by it would overflow.
const LEAST: f32 = 1e-30;

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
    pub(super) height: usize,
    /// Rows that all tiles before it have room for.
    offset: usize,
}

/// A tile's values, `[k / 64][height]`, the last of them filled up with zeros, and what goes with them,
/// `[k / block_size][height]`.
#[derive(Clone, Copy)]
pub(super) struct TileValues<'a> {
    /// Rows of the tile; what is in the place of others has no meaning.
    pub(super) rows: usize,
    pub(super) values: &'a [Values],
    pub(super) blocks: &'a [RowBlock],
}

/// Quantised rows, kept between calls: memory only grows.
#[derive(Default)]
pub(super) struct Activations {
    tiles: Vec<Tile>,
    values: Vec<Values>,
    blocks: Vec<RowBlock>,
    /// `[k / 64]` and `[k / block_size]` of this call.
    strides: [usize; 2],
}

impl Activations {
    /// Makes room for `heights` (rows, and room for rows, of each tile) of `k` values in blocks of
    /// `block_size`.
    pub(super) fn reserve(
        &mut self,
        heights: impl Iterator<Item = (usize, usize)>,
        k: usize,
        block_size: usize,
    ) {
        self.tiles.clear();
        let (mut first, mut offset) = (0, 0);
        for (rows, height) in heights {
            self.tiles.push(Tile { first, rows, height, offset });
            (first, offset) = (first + rows, offset + height);
        }
        self.strides = [k.div_ceil(LINE), k / block_size];
        let grow = |have: usize, stride: usize| (offset * stride).max(have);
        self.values.resize(grow(self.values.len(), self.strides[0]), Values([0; LINE / STEP]));
        let none = RowBlock { offset_4: 0, offset_8: 0, scale: 0.0 };
        self.blocks.resize(grow(self.blocks.len(), self.strides[1]), none);
    }

    /// The tiles of the call.
    pub(super) fn tiles(&self) -> &[Tile] {
        &self.tiles
    }

    /// The content of a tile.
    pub(super) fn tile(&self, tile: Tile) -> TileValues<'_> {
        let [values, blocks] = self.strides.map(|n| tile.offset * n..(tile.offset + tile.height) * n);
        TileValues { rows: tile.rows, values: &self.values[values], blocks: &self.blocks[blocks] }
    }

    /// Access to write tiles side by side.
    pub(super) fn writer(&mut self) -> Writer<'_> {
        Writer {
            values: self.values.as_mut_ptr(),
            blocks: self.blocks.as_mut_ptr(),
            strides: self.strides,
            tiles: &self.tiles,
        }
    }
}

/// Hands tiles out to threads.
pub(super) struct Writer<'a> {
    values: *mut Values,
    blocks: *mut RowBlock,
    strides: [usize; 2],
    tiles: &'a [Tile],
}

// SAFETY: the pointers are to vectors that the writer's maker holds exclusively, and threads only get
// what `tile` gives.
unsafe impl Sync for Writer<'_> {}

impl Writer<'_> {
    /// The content of tile `i`.
    ///
    /// # Safety
    /// Nobody else has that tile's content.
    pub(super) unsafe fn tile(&self, i: usize) -> TileMut<'_> {
        let tile = self.tiles[i];
        let [values, blocks] = self.strides.map(|n| (tile.offset * n, tile.height * n));
        // SAFETY: `reserve` made room for every tile, one after the other; the caller vouches that
        // this one is not given out twice.
        unsafe {
            TileMut {
                tile,
                values: std::slice::from_raw_parts_mut(self.values.add(values.0), values.1),
                blocks: std::slice::from_raw_parts_mut(self.blocks.add(blocks.0), blocks.1),
            }
        }
    }
}

/// A tile to be written.
pub(super) struct TileMut<'a> {
    tile: Tile,
    values: &'a mut [Values],
    blocks: &'a mut [RowBlock],
}

impl TileMut<'_> {
    /// Quantises the tile's rows out of `x`, `[rows, k]`. Inlined where a level compiles it.
    #[inline(always)]
    pub(super) fn quantise(&mut self, x: &[f32], k: usize, block_size: usize) {
        let rows = &x[self.tile.first * k..(self.tile.first + self.tile.rows) * k];
        for (r, row) in rows.chunks_exact(k).enumerate() {
            match block_size {
                32 => self.quantise_row::<32>(r, row),
                64 => self.quantise_row::<64>(r, row),
                _ => self.quantise_row::<128>(r, row),
            }
        }
    }

    #[inline(always)]
    fn quantise_row<const B: usize>(&mut self, r: usize, row: &[f32]) {
        let height = self.tile.height;
        for (i, block) in row.as_chunks::<B>().0.iter().enumerate() {
            let mut values = [0; B];
            self.blocks[i * height + r] = quantise_block(block, &mut values);
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
        _ if !top.is_finite() => (0.0, f32::NAN),
        _ if top < LEAST => (0.0, 0.0),
        _ => (TOP / top, top / TOP),
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
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 32];
            x[17] = bad;
            assert!(block(x).0.scale.is_nan());
        }
        for small in [0.0, -0.0, 1e-31, f32::MIN_POSITIVE / 8.0] {
            let (about, values) = block([small; 32]);
            assert_eq!((about.scale, values), (0.0, [0; 32]));
        }
        let (about, values) = block([f32::MAX; 32]);
        assert_eq!((about.scale, values), (f32::MAX / 127.0, [127; 32]));
    }
}
