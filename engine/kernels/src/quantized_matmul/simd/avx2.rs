//! Owns the kernel's arithmetic in AVX2, without and with VNNI: 8 columns a register.
//!
//! Invariant: a value of [`Avx2`] exists only on a CPU that has AVX2, FMA and F16C, one of
//! `Avx2<true>` only where there is AVX-VNNI besides.
//!
//! Without VNNI a product of 4 k adds pairs in 16 bits, which saturate at 32767. Codes of 4 bits stay
//! below that if those in the high half are shifted down (15 * 127 * 2); for codes of 8 bits the sign
//! moves from the weight to the row's value (127 * 127 * 2).

use std::arch::x86_64::*;

use crate::isa;
use crate::quantized_matmul::activations::{RowBlock, Strip, TileValues};
use crate::quantized_matmul::finish::{Finish, OutputRow, finish};
use crate::quantized_matmul::kernel::{Lanes, Panel, multiply, multiply_rows};
use crate::quantized_matmul::level::{Level, for_each_tile, x86_level};
use crate::quantized_matmul::norm::Norm;
use crate::quantized_matmul::packing::{COLUMNS, LINE, Line};

const NUM: usize = 8;

/// The proof that this CPU has AVX2, and AVX-VNNI where so marked.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
    /// The proof, if there is one.
    pub(in super::super) fn detect() -> Option<Self> {
        let found = isa::has_avx2() && isa::has_f16c() && (!VNNI || isa::has_avx_vnni());
        found.then_some(Self(()))
    }
}

/// Codes of 4 k of 8 columns; without VNNI at 8 bits, magnitudes and signed weights.
#[derive(Clone, Copy)]
pub(in super::super) struct Codes(__m256i, __m256i);

// SAFETY of every block below: `self` is the proof that the CPU has the instructions.
impl<const VNNI: bool> Lanes for Avx2<VNNI> {
    const NUM: usize = NUM;
    type Codes = Codes;
    type Sums = __m256i;

    #[inline(always)]
    fn start<const BITS: usize>(self, row: &RowBlock) -> [__m256i; 2] {
        let offsets = match (BITS, VNNI) {
            (4, true) => [row.offset_4, row.offset_8],
            (4, false) => [row.offset_4; 2],
            (_, true) => [row.offset_8; 2],
            (_, false) => [0; 2],
        };
        // SAFETY: see above.
        offsets.map(|offset| unsafe { _mm256_set1_epi32(offset) })
    }
    #[inline(always)]
    fn codes<const BITS: usize>(self, step: &[Line], v: usize) -> [Codes; 2] {
        // SAFETY: see above; a part of a line is as long as a register, and need not be aligned.
        unsafe {
            let load = |line: &Line| {
                let part: &[u8] = &line[v * LINE / 2..][..LINE / 2];
                _mm256_loadu_si256(part.as_ptr().cast())
            };
            let zero = _mm256_setzero_si256();
            if BITS == 4 {
                let (line, low) = (load(&step[0]), _mm256_set1_epi8(0x0f));
                let second = match VNNI {
                    true => _mm256_andnot_si256(low, line),
                    false => _mm256_and_si256(_mm256_srli_epi16::<4>(line), low),
                };
                return [Codes(_mm256_and_si256(line, low), zero), Codes(second, zero)];
            }
            [load(&step[0]), load(&step[1])].map(|codes| {
                if VNNI {
                    return Codes(codes, zero);
                }
                let signed = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
                Codes(_mm256_abs_epi8(signed), signed)
            })
        }
    }
    #[inline(always)]
    fn dot<const BITS: usize>(self, sums: __m256i, codes: Codes, x: i32) -> __m256i {
        // SAFETY: see above.
        unsafe {
            let x = _mm256_set1_epi32(x);
            if VNNI {
                return _mm256_dpbusd_avx_epi32(sums, codes.0, x);
            }
            let x = if BITS == 8 { _mm256_sign_epi8(x, codes.1) } else { x };
            let pairs = _mm256_maddubs_epi16(codes.0, x);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    fn fold<const BITS: usize>(self, second: bool, sums: __m256i, scales: &[u8], row: f32, to: &mut [f32]) {
        let (scales, to): (&[u8; 2 * NUM], &mut [f32; NUM]) = match (scales.try_into(), to.try_into()) {
            (Ok(scales), Ok(to)) => (scales, to),
            _ => unreachable!("a vector's columns"),
        };
        // SAFETY: see above; both arrays are as long as what is read and written.
        unsafe {
            let sums = if BITS == 4 && !VNNI && second { _mm256_slli_epi32::<4>(sums) } else { sums };
            let scales = _mm256_cvtph_ps(_mm_loadu_si128(scales.as_ptr().cast()));
            let scales = _mm256_mul_ps(scales, _mm256_set1_ps(row));
            let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scales, _mm256_loadu_ps(to.as_ptr()));
            _mm256_storeu_ps(to.as_mut_ptr(), sum);
        }
    }
    #[inline(always)]
    fn prefetch(self, line: &Line, ahead: usize) {
        // SAFETY: prefetching touches nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().wrapping_add(ahead).cast()) }
    }
}

x86_level!(Avx2<false>, "avx2,fma,f16c", 4, [1 2 3 4]);
x86_level!(Avx2<true>, "avx2,fma,f16c,avxvnni", 5, [1 2 3 4 5]);
