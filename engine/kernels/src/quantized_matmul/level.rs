//! Owns the seam between a run of products and the code that is compiled for an instruction set.
//!
//! Invariant: a value of a type that implements [`Level`] exists only on a CPU that has the instructions; which one it
//! is changes no bit of any result, only the time it takes.

use super::activations::{Strip, TileValues};
use super::finish::{Finish, OutputRow};
use super::kernel::Panel;
use super::norm::Norm;
use super::packing::COLUMNS;

/// An instruction set: each function runs code that is compiled for it.
pub(super) trait Level: Copy + Sync {
    /// Rows that a tile may hold.
    const MAX_ROWS: usize;

    /// Rows of each tile that a call's rows are cut into, and rows that the tile has room for.
    fn tiles(self, rows: usize) -> impl Iterator<Item = (usize, usize)> {
        even_tiles(rows, Self::MAX_ROWS)
    }
    /// See [`Strip::quantise`].
    fn quantise(self, strip: &mut Strip, x: &[f32], norm: Option<&Norm>);
    /// Multiplies neighbouring tiles of a call with a panel; `sums` has a row for each of theirs. See
    /// [`super::kernel::multiply`].
    fn multiply(self, panel: &Panel, tiles: &[TileValues], sums: &mut [[f32; COLUMNS]]);
    /// Asks for the lines of `len` bytes from `at` on, which are read soon.
    fn prefetch_read(self, _at: *const u8, _len: usize) {}
    /// Asks to own the lines of `len` floats from `at` on, which are written soon: another core may have them.
    fn prefetch_write(self, _at: *const f32, _len: usize) {}
    /// See [`super::finish::finish`].
    fn finish<'a>(
        self,
        sums: &mut [[f32; COLUMNS]],
        what: &Finish,
        outputs: impl Iterator<Item = OutputRow<'a>>,
    );
}

/// As few tiles as there must be, of nearly equal size.
fn even_tiles(rows: usize, max_rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let num = rows.div_ceil(max_rows);
    (0..num).map(move |i| {
        let rows = (i + 1) * rows / num - i * rows / num;
        (rows, rows)
    })
}

/// Multiplies tiles one after the other; the first fetches the next panel for all of them.
pub(super) fn for_each_tile(
    panel: &Panel,
    tiles: &[TileValues],
    mut sums: &mut [[f32; COLUMNS]],
    multiply: impl Fn(&Panel, &TileValues, &mut [[f32; COLUMNS]]),
) {
    let mut panel = *panel;
    for tile in tiles {
        let (first, rest) = sums.split_at_mut(tile.rows);
        multiply(&panel, tile, first);
        (sums, panel.ahead) = (rest, 0);
    }
}

/// Implements [`Level`] for lanes of x86 with the features that their proof stands for.
#[cfg(target_arch = "x86_64")]
macro_rules! x86_level {
    ($level:ty, $features:literal, $max_rows:literal, $rows:tt) => {
        // SAFETY of every block below: `self` is the proof that the CPU has the features.
        impl Level for $level {
            const MAX_ROWS: usize = $max_rows;

            fn quantise(self, strip: &mut Strip, x: &[f32], norm: Option<&Norm>) {
                #[target_feature(enable = $features)]
                fn compiled(strip: &mut Strip, x: &[f32], norm: Option<&Norm>) {
                    strip.quantise(x, norm);
                }
                // SAFETY: see above.
                unsafe { compiled(strip, x, norm) }
            }
            fn multiply(self, panel: &Panel, tiles: &[TileValues], sums: &mut [[f32; COLUMNS]]) {
                #[target_feature(enable = $features)]
                fn compiled<const BITS: usize, const ROWS: usize>(
                    level: $level,
                    panel: &Panel,
                    tile: &TileValues,
                    sums: &mut [[f32; COLUMNS]],
                ) {
                    multiply::<_, BITS, ROWS>(level, panel, tile, sums);
                }
                for_each_tile(panel, tiles, sums, |panel, tile, sums| {
                    // SAFETY: see above.
                    unsafe {
                        multiply_rows!(
                            compiled,
                            tile.height,
                            panel.format.bits,
                            (self, panel, tile, sums),
                            $rows
                        );
                    }
                });
            }
            fn prefetch_read(self, at: *const u8, len: usize) {
                for line in (0..len).step_by(LINE) {
                    // SAFETY: prefetching touches nothing, wherever it points.
                    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(line).cast()) };
                }
            }
            fn finish<'a>(
                self,
                sums: &mut [[f32; COLUMNS]],
                what: &Finish,
                outputs: impl Iterator<Item = OutputRow<'a>>,
            ) {
                #[target_feature(enable = $features)]
                fn compiled<'a>(
                    sums: &mut [[f32; COLUMNS]],
                    what: &Finish,
                    outputs: impl Iterator<Item = OutputRow<'a>>,
                ) {
                    finish(sums, what, outputs);
                }
                // SAFETY: see above.
                unsafe { compiled(sums, what, outputs) }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use x86_level;
