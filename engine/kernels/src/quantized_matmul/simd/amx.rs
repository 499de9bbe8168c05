//! Owns the kernel's arithmetic in AMX: 16 rows at once. Calls of very few rows are faster in AVX-512, and
//! give the same bits.
//!
//! Codes of 4 bits become signed, in the high half of a byte: their sums need no correction, and are 16 times
//! too large for all columns, which goes away with powers of 2: see [`widen`]. Codes of 8 bits are read where
//! they lie.
//!
//! Invariant: a value of [`Amx`] exists only on a CPU with AMX-INT8, GFNI and AVX-512 VNNI, after Linux
//! allowed this process the use of tiles.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::avx512::Avx512;
use crate::amx::{self, HEIGHT, Shapes};
use crate::isa;
use crate::quantized_matmul::activations::{RowBlock, Strip, TileValues, Values};
use crate::quantized_matmul::finish::{Finish, OutputRow};
use crate::quantized_matmul::kernel::{Lanes, Panel};
use crate::quantized_matmul::level::Level;
use crate::quantized_matmul::norm::Norm;
use crate::quantized_matmul::packing::{COLUMNS, HALF, LINE, Line, STEP};

/// Fewer rows than this are faster in AVX-512: of 4 and of 8 bits.
const MIN_ROWS: [usize; 2] = [3, 5];
/// Most values of K that a tile of rows holds.
const WIDTH: usize = 64;
/// The largest block.
const MAX_BLOCK: usize = 512;

/// The proof that this process may use AMX.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Amx(Avx512);

impl Amx {
    /// The proof, if there is one.
    pub(in super::super) fn detect() -> Option<Self> {
        Avx512::detect().filter(|_| isa::has_amx_int8()).map(Self)
    }
}

/// Tiles for `height` rows of `width` values: tmm0 and tmm1 hold sums of 16 columns, tmm4 values, tmm6 and
/// tmm7 codes.
fn shapes(height: usize, width: usize) -> Shapes {
    Shapes::new([
        (0, LINE, height),
        (1, LINE, height),
        (4, width, height),
        (6, LINE, width / STEP),
        (7, LINE, width / STEP),
    ])
}

/// Signed codes of a block: for each step columns below 16, then the others.
#[repr(C, align(64))]
struct Codes([[Line; 2]; MAX_BLOCK / STEP]);

/// Sums of a block, columns below 16 and the others apart, in the rows that tiles have.
#[repr(C, align(64))]
struct Sums([[MaybeUninit<[i32; HALF]>; HEIGHT]; 2]);

impl Level for Amx {
    const MAX_ROWS: usize = HEIGHT;

    fn tiles(self, rows: usize) -> impl Iterator<Item = (usize, usize)> {
        // Tiles of a call have one shape.
        let height = rows.min(HEIGHT);
        (0..rows).step_by(HEIGHT).map(move |first| (height.min(rows - first), height))
    }
    fn quantise(self, strip: &mut Strip, x: &[f32], norm: Option<&Norm>) {
        self.0.quantise(strip, x, norm);
    }
    fn multiply(self, panel: &Panel, tiles: &[TileValues], sums: &mut [[f32; COLUMNS]]) {
        let bits = panel.format.bits;
        match bits {
            _ if tiles[0].height < MIN_ROWS[bits / 8] => self.0.multiply(panel, tiles, sums),
            // SAFETY: `self` is the proof that the CPU has AVX-512 with VNNI, and AMX with leave to use it.
            4 => unsafe { multiply::<4>(self.0, panel, tiles, sums) },
            // SAFETY: as above.
            _ => unsafe { multiply::<8>(self.0, panel, tiles, sums) },
        }
    }
    fn prefetch_read(self, at: *const u8, len: usize) {
        self.0.prefetch_read(at, len);
    }
    fn prefetch_write(self, at: *const f32, len: usize) {
        for line in (0..len).step_by(LINE / size_of::<f32>()) {
            // SAFETY: prefetching touches nothing, wherever it points.
            unsafe {
                asm!("prefetchw [{}]", in(reg) at.wrapping_add(line), options(nostack, preserves_flags))
            };
        }
    }
    fn finish<'a>(
        self,
        sums: &mut [[f32; COLUMNS]],
        what: &Finish,
        outputs: impl Iterator<Item = OutputRow<'a>>,
    ) {
        self.0.finish(sums, what, outputs);
    }
}

/// As [`Level::multiply`], for tiles of one height; codes are unpacked once for all of them.
///
/// # Safety
/// This process may use AMX.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,gfni")]
unsafe fn multiply<const BITS: usize>(
    lanes: Avx512,
    panel: &Panel,
    tiles: &[TileValues],
    sums: &mut [[f32; COLUMNS]],
) {
    let (height, block_size) = (tiles[0].height, panel.format.block_size);
    let mut codes = MaybeUninit::uninit();
    let mut whole = Sums([[MaybeUninit::uninit(); HEIGHT]; 2]);
    sums.fill([0.0; COLUMNS]);
    let shapes = shapes(height, block_size.min(WIDTH));
    // SAFETY: the caller vouches for AMX; the shapes are valid ones, released below.
    unsafe { shapes.load() };
    let parts = block_size.div_ceil(WIDTH);
    for (b, block) in panel.lines.chunks_exact(panel.format.block_lines()).enumerate() {
        let Some((scales, lines)) = block.split_last() else { break };
        let mut ahead = panel.ahead;
        lanes.prefetch(scales, ahead);
        let steps = match BITS {
            4 => unpack(lanes, lines, ahead, &mut codes),
            _ => lines.as_ptr(),
        };
        let scales = widen::<BITS>(scales);
        let mut sums = &mut *sums;
        for tile in tiles {
            // Two blocks of 32 share the lines of their rows.
            let at = b * block_size;
            let values = &tile.values[at / WIDTH * height..][..parts * height];
            // SAFETY: tiles are set up, for rows of as many values as there are from `at` on; a block has
            // two lines a step, of codes that are signed at 4 bits.
            unsafe { dot::<BITS>(values, height, at % WIDTH, steps, parts, ahead, &mut whole) };
            let (these, rest) = sums.split_at_mut(tile.rows);
            // SAFETY: a tile has no more rows than room for them, and `dot` wrote sums of all of that.
            unsafe { fold::<BITS>(&whole, &tile.blocks[b * height..][..tile.rows], scales, these) };
            (sums, ahead) = (rest, 0);
        }
    }
    // SAFETY: tiles were set up above.
    unsafe { amx::release() };
}

/// Writes a block's codes of 4 bits as signed numbers, 16 times as large, and returns where.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,gfni")]
#[inline]
fn unpack(lanes: Avx512, lines: &[Line], ahead: usize, codes: &mut MaybeUninit<Codes>) -> *const Line {
    // As a matrix of bits: moves the low half of a byte to its high half, and 0 to the low one.
    const LOW_TO_HIGH: i64 = 0x0102_0408;
    let (high, sign_of_high) = (_mm512_set1_epi8(-0x10), _mm512_set1_epi8(-0x78));
    let codes = codes.as_mut_ptr().cast::<__m512i>();
    for (s, line) in lines.iter().take(MAX_BLOCK / STEP).enumerate() {
        lanes.prefetch(line, ahead);
        // SAFETY: a line is as long as a register, and the codes have room for two of each step.
        unsafe {
            let line = _mm512_loadu_si512(line.as_ptr().cast());
            let low = _mm512_gf2p8affine_epi64_epi8::<0x80>(line, _mm512_set1_epi64(LOW_TO_HIGH));
            codes.add(2 * s).write(low);
            // (line ^ sign) & high
            codes.add(2 * s + 1).write(_mm512_ternarylogic_epi64::<0x28>(line, sign_of_high, high));
        }
    }
    codes.cast()
}

/// The scales for sums of a block, except that columns from 16 on stay 16 times too large at 4 bits, as
/// [`Lanes::fold`] leaves them.
#[target_feature(enable = "avx512f")]
#[inline]
fn widen<const BITS: usize>(scales: &Line) -> [__m512; 2] {
    // SAFETY: a line holds 32 scales.
    unsafe {
        let scales = scales.as_ptr().cast::<__m256i>();
        let unit = _mm512_set1_ps(if BITS == 4 { 1.0 / 16.0 } else { 1.0 });
        let first = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256(scales)), unit);
        [first, _mm512_cvtph_ps(_mm256_loadu_si256(scales.add(1)))]
    }
}

/// Sums of a block: `parts` times as many values of each of `height` rows as a tile holds, with as many codes.
/// Those of 8 bits are as they are stored, so their sums lack the rows' `offset_8`; and 2 KiB for each part,
/// `ahead` of them, are asked for, unless that is 0. (Codes of 4 bits were asked for where they were unpacked.)
///
/// # Safety
/// Tiles are set up by [`Shapes::new`] for `height` rows, of as many values as there are from `start` on in each
/// line of `values`, `[parts][height]`; `codes` has two lines for each 4 of them, in each part.
#[inline(always)]
unsafe fn dot<const BITS: usize>(
    values: &[Values],
    height: usize,
    start: usize,
    codes: *const Line,
    parts: usize,
    ahead: usize,
    sums: &mut Sums,
) {
    macro_rules! dot {
        // The instruction, and what is asked for beside it.
        ($multiply:literal $([$($line:literal)*])*) => {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm4, [{values} + {line}]",
                "tileloadd tmm6, [{codes} + {step}]",
                concat!($multiply, " tmm0, tmm4, tmm6"),
                $($(concat!("prefetcht0 [{codes} + {ahead} + ", $line, "]"),)*)*
                "tileloadd tmm7, [{codes} + {step} + 64]",
                concat!($multiply, " tmm1, tmm4, tmm7"),
                "add {values}, {part}",
                "add {codes}, 2048",
                "dec {parts}",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 1024], tmm1",
                // An operand has to be named, whether lines are asked for or not.
                "# {ahead}",
                values = inout(reg) values.as_ptr().byte_add(start) => _,
                part = in(reg) height * LINE,
                codes = inout(reg) codes => _,
                parts = inout(reg) parts => _,
                ahead = in(reg) ahead,
                line = in(reg) LINE,
                step = in(reg) 2 * LINE,
                sums = in(reg) sums,
                out("tmm0") _,
                out("tmm1") _,
                out("tmm4") _,
                out("tmm6") _,
                out("tmm7") _,
                options(nostack),
            )
        };
    }
    // SAFETY: the caller vouches for the shapes; all that is read and written is inside of the arguments.
    unsafe {
        match (BITS, ahead) {
            (4, _) => dot!("tdpbssd"),
            (_, 0) => dot!("tdpbsud"),
            _ => dot!("tdpbsud"
                [0 64 128 192 256 320 384 448]
                [512 576 640 704 768 832 896 960]
                [1024 1088 1152 1216 1280 1344 1408 1472]
                [1536 1600 1664 1728 1792 1856 1920 1984]),
        }
    }
}

/// `to = fma(sums, scales * row's scale, to)`, with what `sums` lack.
///
/// # Safety
/// Sums of as many rows are written.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn fold<const BITS: usize>(
    sums: &Sums,
    rows: &[RowBlock],
    scales: [__m512; 2],
    to: &mut [[f32; COLUMNS]],
) {
    let [first, second] = &sums.0;
    for (((row, first), second), to) in rows.iter().zip(first).zip(second).zip(to) {
        for (half, (sums, scales)) in [first, second].into_iter().zip(scales).enumerate() {
            let to = to[half * HALF..][..HALF].as_mut_ptr();
            // SAFETY: both arrays are as long as a register; the caller vouches for the sums.
            unsafe {
                let mut sums = _mm512_loadu_si512(sums.as_ptr().cast());
                if BITS == 8 {
                    sums = _mm512_add_epi32(sums, _mm512_set1_epi32(row.offset_8));
                }
                let sums = _mm512_cvtepi32_ps(sums);
                let scales = _mm512_mul_ps(scales, _mm512_set1_ps(row.scale));
                _mm512_storeu_ps(to, _mm512_fmadd_ps(sums, scales, _mm512_loadu_ps(to)));
            }
        }
    }
}
