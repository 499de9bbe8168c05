//! Owns the kernel's arithmetic in AMX: 16 or 32 rows at once, for steps that have as many; AVX-512 does
//! the rest, to the same bits.
//!
//! Invariant: a value of [`Amx`] exists only on a CPU with AMX-INT8 and AVX-512 VNNI, after Linux allowed
//! this process the use of tiles. The compiler knows nothing of tiles: each function that sets them up
//! also releases them.

use std::arch::asm;
use std::arch::x86_64::*;

use super::avx512::Avx512;
use super::{COLUMNS, Finish, Level, Panel, TileMut, TileValues, even_tiles};
use crate::operators::quantized_matmul::activations::Values;
use crate::operators::quantized_matmul::kernel::Lanes;
use crate::operators::quantized_matmul::packing::{HALF, LINE, Line, STEP};

/// Rows of a tile.
const HEIGHT: usize = 16;
/// Fewer rows than this are faster in AVX-512.
const MIN_ROWS: usize = 5;
/// Values of K that a tile of rows holds; a block is one or two of them.
const WIDTH: usize = 64;

/// The proof that this process may use AMX.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Amx(Avx512);

impl Amx {
    /// The proof, if there is one.
    pub(in super::super) fn detect() -> Option<Self> {
        const TILE_AND_INT8: u32 = 0b11 << 24;
        let found = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & TILE_AND_INT8 == TILE_AND_INT8;
        Avx512::detect().filter(|_| found && allowed()).map(Self)
    }
}

/// Asks Linux for the memory that saves tiles at a change of threads.
fn allowed() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_PRCTL: usize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const XTILEDATA: usize = 18;
        let result: isize;
        // SAFETY: a system call that changes nothing but what the process may use.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XTILEDATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        result == 0
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// What `ldtilecfg` reads: every tile has 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPES: Shapes = {
    let mut shapes =
        Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut tile = 0;
    while tile < 8 {
        shapes.row_bytes[tile] = 64;
        shapes.rows[tile] = HEIGHT as u8;
        tile += 1;
    }
    shapes
};

/// The codes of a block of 4 bits, columns below 16 and the others apart.
#[repr(C, align(64))]
struct Codes([[Line; 128 / STEP]; 2]);

/// Sums of a block: those of 16 rows and 16 columns, by rows and halves of the panel.
#[repr(C, align(64))]
struct Sums([[[[i32; HALF]; HEIGHT]; 2]; 2]);

impl Level for Amx {
    const MAX_ROWS: usize = 2 * HEIGHT;

    fn tiles(self, rows: usize, block_size: usize) -> impl Iterator<Item = (usize, usize)> {
        let full = if block_size < WIDTH { 0 } else { rows / Self::MAX_ROWS };
        let rest = rows - full * Self::MAX_ROWS;
        let padded = (block_size >= WIDTH && rest >= MIN_ROWS).then(|| (rest, rest.next_multiple_of(HEIGHT)));
        let vnni = if padded.is_some() { 0 } else { rest };
        let full = std::iter::repeat_n((Self::MAX_ROWS, Self::MAX_ROWS), full);
        full.chain(padded).chain(even_tiles(vnni, Avx512::MAX_ROWS))
    }
    fn quantise(self, tile: &mut TileMut, x: &[f32], k: usize, block_size: usize) {
        self.0.quantise(tile, x, k, block_size);
    }
    fn multiply(self, height: usize, panel: &Panel, tile: &TileValues, sums: &mut [[f32; COLUMNS]]) {
        // SAFETY: `self` is the proof that the CPU has AVX-512 with VNNI, and AMX with leave to use it.
        unsafe {
            match (panel.format.bits, height) {
                (4, HEIGHT) => multiply::<4, 1>(self.0, panel, tile, sums),
                (_, HEIGHT) => multiply::<8, 1>(self.0, panel, tile, sums),
                (4, Self::MAX_ROWS) => multiply::<4, 2>(self.0, panel, tile, sums),
                (_, Self::MAX_ROWS) => multiply::<8, 2>(self.0, panel, tile, sums),
                _ => self.0.multiply(height, panel, tile, sums),
            }
        }
    }
    fn finish<'a>(
        self,
        sums: &mut [[f32; COLUMNS]],
        what: &Finish,
        outputs: impl Iterator<Item = &'a mut [f32]>,
    ) {
        self.0.finish(sums, what, outputs);
    }
}

/// As [`super::multiply`], for `TILES` times 16 rows.
///
/// # Safety
/// This process may use AMX.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn multiply<const BITS: usize, const TILES: usize>(
    lanes: Avx512,
    panel: &Panel,
    tile: &TileValues,
    sums: &mut [[f32; COLUMNS]],
) {
    let height = TILES * HEIGHT;
    let parts = panel.format.block_size / WIDTH;
    let mut codes = Codes([[[0; LINE]; 128 / STEP]; 2]);
    let mut whole = Sums([[[[0; HALF]; HEIGHT]; 2]; 2]);
    for row in &mut sums[..tile.rows] {
        row.fill(0.0);
    }
    // SAFETY: the caller vouches for AMX; the shapes are valid ones.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &SHAPES, options(nostack, readonly)) };
    let blocks = panel.lines.chunks_exact(panel.format.block_lines());
    let values = tile.values.chunks_exact(parts * height);
    for ((block, values), rows) in blocks.zip(values).zip(tile.blocks.chunks_exact(height)) {
        let Some((scales, lines)) = block.split_last() else { break };
        for line in lines {
            lanes.prefetch(line, panel.ahead);
        }
        let first = if BITS == 4 {
            for (s, line) in lines.as_chunks::<1>().0.iter().enumerate() {
                let [low, high] = lanes.codes::<4>(line, 0);
                for (to, from) in codes.0.iter_mut().zip([low, high]) {
                    // SAFETY: AVX-512 is there, and a line is as long as a register.
                    unsafe { _mm512_storeu_si512(to[s].as_mut_ptr().cast(), from) };
                }
            }
            codes.0[0].as_ptr()
        } else {
            lines.as_ptr()
        };
        // SAFETY: the block has lines, and the tile values, for `parts` times 64 of K; tiles are set up.
        unsafe { dot::<BITS, TILES>(values, first, parts, &mut whole) };
        for r in 0..tile.rows {
            for (half, start) in lanes.start::<BITS>(&rows[r]).into_iter().enumerate() {
                let column = half * HALF;
                let whole = whole.0[r / HEIGHT][half][r % HEIGHT].as_ptr();
                // SAFETY: AVX-512 is there, and the sums are as long as a register.
                let whole = unsafe { _mm512_add_epi32(start, _mm512_load_si512(whole.cast())) };
                let to = &mut sums[r][column..column + HALF];
                let scales = &scales[2 * column..2 * (column + HALF)];
                lanes.fold::<BITS>(half == 1, whole, scales, rows[r].scale, to);
            }
        }
    }
    // SAFETY: tiles were set up above.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// Sums of a block: `parts` times 64 values of `TILES` times 16 rows with codes from `codes` on.
///
/// # Safety
/// Tiles have the shapes of [`SHAPES`]. At 4 bits `codes` starts a [`Codes`], at 8 bits a block of a panel.
#[inline(always)]
unsafe fn dot<const BITS: usize, const TILES: usize>(
    values: &[Values],
    codes: *const Line,
    parts: usize,
    sums: &mut Sums,
) {
    // Bytes from a step's codes to the next one's, and from columns below 16 to the others.
    let (stride, half) = if BITS == 4 { (LINE, size_of::<Codes>() / 2) } else { (2 * LINE, LINE) };
    // SAFETY: the caller vouches for the shapes and the memory; `values` and `sums` are as long as what is
    // read of them and written to them.
    unsafe {
        if TILES == 1 {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm6, [{codes} + {stride}]",
                "tileloadd tmm4, [{values} + {line}]",
                "tdpbsud tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{others} + {stride}]",
                "tdpbsud tmm1, tmm4, tmm7",
                "add {values}, 1024",
                "add {codes}, {next}",
                "add {others}, {next}",
                "dec {parts}",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 1024], tmm1",
                values = inout(reg) values.as_ptr() => _,
                codes = inout(reg) codes => _,
                others = inout(reg) codes.byte_add(half) => _,
                parts = inout(reg) parts => _,
                stride = in(reg) stride,
                next = in(reg) HEIGHT * stride,
                line = in(reg) LINE,
                sums = in(reg) sums,
                options(nostack),
            );
        } else {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{codes} + {stride}]",
                "tileloadd tmm4, [{values} + {line}]",
                "tdpbsud tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{others} + {stride}]",
                "tdpbsud tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{values} + {line} + 1024]",
                "tdpbsud tmm2, tmm5, tmm6",
                "tdpbsud tmm3, tmm5, tmm7",
                "add {values}, 2048",
                "add {codes}, {next}",
                "add {others}, {next}",
                "dec {parts}",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 1024], tmm1",
                "tilestored [{sums} + {line} + 2048], tmm2",
                "tilestored [{sums} + {line} + 3072], tmm3",
                values = inout(reg) values.as_ptr() => _,
                codes = inout(reg) codes => _,
                others = inout(reg) codes.byte_add(half) => _,
                parts = inout(reg) parts => _,
                stride = in(reg) stride,
                next = in(reg) HEIGHT * stride,
                line = in(reg) LINE,
                sums = in(reg) sums,
                options(nostack),
            );
        }
    }
}
