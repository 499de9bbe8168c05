//! Owns the kernel's arithmetic in AVX-512 with VNNI: 16 columns a register, 4 k an instruction.
//!
//! Invariant: a value of [`Avx512`] exists only on a CPU that has F, BW and VNNI.

use std::arch::x86_64::*;

use crate::isa;
use crate::quantized_matmul::activations::{RowBlock, Strip, TileValues};
use crate::quantized_matmul::finish::{Finish, OutputRow, finish};
use crate::quantized_matmul::kernel::{Lanes, Panel, multiply, multiply_rows};
use crate::quantized_matmul::level::{Level, for_each_tile, x86_level};
use crate::quantized_matmul::norm::Norm;
use crate::quantized_matmul::packing::{COLUMNS, HALF, LINE, Line};

/// The proof that this CPU has AVX-512 with VNNI.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Avx512(());

impl Avx512 {
    /// The proof, if there is one.
    pub(in super::super) fn detect() -> Option<Self> {
        isa::has_avx512_vnni().then_some(Self(()))
    }
}

// SAFETY of every block below: `self` is the proof that the CPU has the instructions.
impl Lanes for Avx512 {
    const NUM: usize = HALF;
    type Codes = __m512i;
    type Sums = __m512i;

    #[inline(always)]
    fn start<const BITS: usize>(self, row: &RowBlock) -> [__m512i; 2] {
        let first = if BITS == 4 { row.offset_4 } else { row.offset_8 };
        // SAFETY: see above.
        unsafe { [_mm512_set1_epi32(first), _mm512_set1_epi32(row.offset_8)] }
    }
    #[inline(always)]
    fn codes<const BITS: usize>(self, step: &[Line], _v: usize) -> [__m512i; 2] {
        // SAFETY: see above; a line is as long as a register, and need not be aligned.
        unsafe {
            let load = |line: &Line| _mm512_loadu_si512(line.as_ptr().cast());
            if BITS == 8 {
                return [load(&step[0]), load(&step[1])];
            }
            let (line, low) = (load(&step[0]), _mm512_set1_epi8(0x0f));
            // The high half stays where it is: 16 times the code, at no cost.
            [_mm512_and_si512(line, low), _mm512_andnot_si512(low, line)]
        }
    }
    #[inline(always)]
    fn dot<const BITS: usize>(self, sums: __m512i, codes: __m512i, x: i32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(x)) }
    }
    #[inline(always)]
    fn fold<const BITS: usize>(self, _second: bool, sums: __m512i, scales: &[u8], row: f32, to: &mut [f32]) {
        let (scales, to): (&[u8; 2 * HALF], &mut [f32; HALF]) = match (scales.try_into(), to.try_into()) {
            (Ok(scales), Ok(to)) => (scales, to),
            _ => unreachable!("a vector's columns"),
        };
        // SAFETY: see above; both arrays are as long as what is read and written.
        unsafe {
            let scales = _mm512_cvtph_ps(_mm256_loadu_si256(scales.as_ptr().cast()));
            let scales = _mm512_mul_ps(scales, _mm512_set1_ps(row));
            let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scales, _mm512_loadu_ps(to.as_ptr()));
            _mm512_storeu_ps(to.as_mut_ptr(), sum);
        }
    }
    #[inline(always)]
    fn prefetch(self, line: &Line, ahead: usize) {
        // SAFETY: prefetching touches nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().wrapping_add(ahead).cast()) }
    }
}

x86_level!(Avx512, "avx512f,avx512bw,avx512vnni", 10, [1 2 3 4 5 6 7 8 9 10]);
