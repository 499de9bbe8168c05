//! Owns the choice of an instruction set.
//!
//! Invariant: it changes no bit of any result, only the time it takes.

pub(super) mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;

use super::activations::{Activations, Strip, TileValues};
use super::finish::{Finish, OutputRow, finish};
use super::kernel::{Panel, multiply, multiply_rows};
use super::multiply::{Call, run};
use super::norm::Norm;
use super::packing::COLUMNS;
use crate::operators::parallel::Parallel;

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
fn for_each_tile(
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

/// The instruction set that a kernel uses. A value exists only if this CPU has it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Simd {
    Portable(portable::Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2<false>),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(avx2::Avx2<true>),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(target_arch = "x86_64")]
    Amx(amx::Amx),
}

impl Simd {
    /// The names that [`Self::named`] knows, best last.
    pub(super) const NAMES: [&'static str; 5] = ["portable", "avx2", "avxvnni", "avx512", "amx"];

    /// The level called `name`.
    ///
    /// # Errors
    /// Says whether the name is unknown or this CPU lacks it.
    pub(super) fn named(name: &str) -> Result<Self, String> {
        let level = match name {
            "portable" => Some(Self::Portable(portable::Portable)),
            #[cfg(target_arch = "x86_64")]
            "avx2" => avx2::Avx2::detect().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            "avxvnni" => avx2::Avx2::detect().map(Self::AvxVnni),
            #[cfg(target_arch = "x86_64")]
            "avx512" => avx512::Avx512::detect().map(Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            "amx" => amx::Amx::detect().map(Self::Amx),
            _ if Self::NAMES.contains(&name) => None,
            _ => return Err(format!("{name:?} is none of {}", Self::NAMES.join(", "))),
        };
        level.ok_or_else(|| format!("this CPU does not have {name}, for the matrix product with VNNI"))
    }

    /// The level that `forced` names, or the best one of this CPU.
    ///
    /// # Errors
    /// As [`Self::named`].
    pub(super) fn choose(forced: Option<&str>) -> Result<Self, String> {
        match forced {
            Some(name) => Self::named(name),
            None => Ok(Self::NAMES
                .iter()
                .rev()
                .find_map(|name| Self::named(name).ok())
                .unwrap_or(Self::Portable(portable::Portable))),
        }
    }

    /// Computes `calls`; see [`run`].
    ///
    /// # Errors
    /// As [`run`].
    pub(super) fn run<const NUM: usize>(
        self,
        calls: &[Call; NUM],
        activations: &mut Activations,
        threads: &impl Parallel,
    ) -> Result<(), String> {
        match self {
            Self::Portable(level) => run(level, calls, activations, threads),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(level) => run(level, calls, activations, threads),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(level) => run(level, calls, activations, threads),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(level) => run(level, calls, activations, threads),
            #[cfg(target_arch = "x86_64")]
            Self::Amx(level) => run(level, calls, activations, threads),
        }
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
use x86_level;
