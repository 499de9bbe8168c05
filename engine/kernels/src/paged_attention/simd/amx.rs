//! Owns the kernels' arithmetic in AMX: bfloat16 products of 16 rows with 64 columns. All else is AVX-512's.
//!
//! Invariant: a value of [`Amx`] exists only on a CPU with AMX-BF16, AVX512-BF16 and what [`Avx512`] needs, after
//! Linux allowed this process the use of tiles.

use std::arch::asm;
use std::arch::x86_64::*;

use super::avx2::Xmm;
use super::avx512::{Avx512, Zmm};
use super::portable::Floats;
use crate::amx::ROW;
use crate::isa;
use crate::paged_attention::lanes::Registers;

/// Tiles that a product has side by side: enough sums for one to wait while the others are at work.
pub(in super::super) const ACROSS: usize = 4;

/// Where the tiles of a product's right side start: for each part of the left side's width, of each column tile.
pub(in super::super) type Right = [*const u8; ACROSS];

/// The proof that this process may use AMX with bfloat16.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Amx(pub(in super::super) Avx512);

impl Amx {
    /// The proof, if there is one.
    pub(in super::super) fn detect() -> Option<Self> {
        Avx512::detect().filter(|_| isa::has_amx_bf16()).map(Self)
    }

    /// 32 floats as two lines of bfloat16 that add up to them, but for 2^-16 of each at most.
    #[inline(always)]
    pub(in super::super) fn split(self, [first, second]: [__m512; 2]) -> [__m512i; 2] {
        // The upper halves of 32 floats.
        const UPPER: [u16; 32] = {
            let mut upper = [0; 32];
            let mut i = 0;
            while i < 32 {
                upper[i] = 2 * i as u16 + 1;
                i += 1;
            }
            upper
        };
        // SAFETY: `self` is the proof that the CPU has the instructions; the indices are as long as a register.
        unsafe {
            let (a, b) = (_mm512_castps_si512(first), _mm512_castps_si512(second));
            let high = _mm512_permutex2var_epi16(a, _mm512_loadu_si512(UPPER.as_ptr().cast()), b);
            let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            let first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_and_si512(a, mask)));
            let second = _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_and_si512(b, mask)));
            // Both types are 512 bits of any pattern.
            let low: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, first));
            [high, low]
        }
    }

    /// The line `from` of 16 pairs: both of each, only the first or, if `num_valid` is 0, zeros.
    ///
    /// # Safety
    /// `from` is valid for reading, unless zeros are asked for.
    #[inline(always)]
    pub(in super::super) unsafe fn first_of_pairs(self, from: *const __m512i, num_valid: usize) -> __m512i {
        let valid = [0, 0x5555_5555, u32::MAX][num_valid.min(2)];
        // SAFETY: `self` is the proof that the CPU has the instruction; the caller vouches for `from`, of which
        // nothing is read where `valid` is 0.
        unsafe { _mm512_maskz_loadu_epi16(valid, from.cast()) }
    }

    /// Products of 16 rows with 64 columns, `to = left * right`, over 32 numbers for each of `right`'s entries;
    /// beside them whole tiles of `ahead`, if there are any, are asked for. A sum is one chain of operations
    /// whatever else the tiles hold.
    ///
    /// # Safety
    /// Tiles are set up as the level of [`super::super::tiles`] does it. `left` has 2 * 16 lines for each of `right`'s entries: the
    /// rows' high parts, then their low ones, which [`Self::split`] gave. `right`'s tiles are 16 lines of 16
    /// pairs. `ahead` is empty or as long as `right`, and its addresses may be any. `to` has 16 rows of 64
    /// floats, `to_stride` bytes apart.
    #[inline(always)]
    pub(in super::super) unsafe fn multiply(
        self,
        left: *const f32,
        right: &[Right],
        ahead: &[Right],
        to: *mut f32,
        to_stride: usize,
    ) {
        macro_rules! multiply {
            ($hint:tt) => {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm4, [{left} + {row}]",
                    "tileloadd tmm5, [{left} + {row} + 1024]",
                    multiply!(@columns $hint, "0", "8", "tmm0", "tmm1"),
                    multiply!(@columns $hint, "16", "24", "tmm2", "tmm3"),
                    "add {left}, 2048",
                    "add {right}, 32",
                    "add {ahead}, 32",
                    "dec {num}",
                    "jnz 2b",
                    "tilestored [{to} + {to_stride}], tmm0",
                    "tilestored [{to} + {to_stride} + 64], tmm1",
                    "tilestored [{to} + {to_stride} + 128], tmm2",
                    "tilestored [{to} + {to_stride} + 192], tmm3",
                    left = inout(reg) left => _,
                    right = inout(reg) right.as_ptr() => _,
                    ahead = inout(reg) ahead.as_ptr() => _,
                    num = inout(reg) right.len() => _,
                    row = in(reg) ROW,
                    tile = out(reg) _,
                    to = in(reg) to,
                    to_stride = in(reg) to_stride,
                    out("tmm0") _,
                    out("tmm1") _,
                    out("tmm2") _,
                    out("tmm3") _,
                    out("tmm4") _,
                    out("tmm5") _,
                    out("tmm6") _,
                    out("tmm7") _,
                    options(nostack),
                )
            };
            // Two tiles of columns, and the lines asked for beside them.
            (@columns $hint:tt, $first:literal, $second:literal, $to_first:literal, $to_second:literal) => {
                concat!(
                    "mov {tile}, [{right} + ", $first, "]\n",
                    "tileloadd tmm6, [{tile} + {row}]\n",
                    "mov {tile}, [{right} + ", $second, "]\n",
                    "tileloadd tmm7, [{tile} + {row}]\n",
                    "tdpbf16ps ", $to_first, ", tmm4, tmm6\n",
                    "tdpbf16ps ", $to_second, ", tmm4, tmm7\n",
                    multiply!(@ask $hint, $first),
                    "tdpbf16ps ", $to_first, ", tmm5, tmm6\n",
                    "tdpbf16ps ", $to_second, ", tmm5, tmm7\n",
                    multiply!(@ask $hint, $second),
                )
            };
            (@ask "", $tile:literal) => { "" };
            (@ask $hint:tt, $tile:literal) => {
                concat!(
                    "mov {tile}, [{ahead} + ", $tile, "]\n",
                    ".irp line, 0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960\n",
                    $hint, " [{tile} + \\line]\n",
                    ".endr\n",
                )
            };
        }
        // SAFETY: the caller vouches for the tiles and for all that is read and written; asking for a line
        // touches nothing.
        unsafe {
            match ahead {
                [] => multiply!(""),
                _ => multiply!("prefetcht1"),
            }
        }
    }
}

impl Registers for Amx {
    type Wide = Zmm;
    type Narrow = Xmm;
    type Single = Floats<1>;

    #[inline(always)]
    fn wide(self) -> Zmm {
        self.0.wide()
    }
    #[inline(always)]
    fn narrow(self) -> Xmm {
        self.0.narrow()
    }
    #[inline(always)]
    fn single(self) -> Floats<1> {
        self.0.single()
    }
}
