//! Owns the kernels' arithmetic in AVX-512: 32 registers of 16 floats.
//!
//! Invariant: a value of [`Avx512`] exists only on a CPU that has F, VL, BW and DQ, and AVX2 with FMA.

use std::arch::x86_64::*;

use super::avx2::{Avx2, Xmm};
use super::portable::Floats;
use crate::isa;
use crate::paged_attention::attend::{Job, attend};
use crate::paged_attention::element::Element;
use crate::paged_attention::lanes::{Registers, x86_lanes};
use crate::paged_attention::level::Level;
use crate::paged_attention::plan::Task;
use crate::paged_attention::products::Vectors;
use crate::paged_attention::workspace::Scratch;

/// The proof that this CPU has AVX-512 as of Skylake's servers.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Avx512(Avx2);

impl Avx512 {
    /// The proof, if there is one.
    pub(in super::super) fn detect() -> Option<Self> {
        Avx2::detect().filter(|_| isa::has_avx512()).map(Self)
    }
}

x86_lanes!(
    Zmm(Avx512),
    __m512,
    16,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_add_ps,
    _mm512_sub_ps,
    _mm512_mul_ps,
    _mm512_fmadd_ps,
    _mm512_max_ps,
    |from| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
        from.cast()
    )))),
    |x, limit, y| _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), y),
    |score, position, visible, masked| {
        _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(position, visible), masked, score)
    },
    |y, z| _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_castps_si512(y),
        _mm512_slli_epi32::<23>(_mm512_castps_si512(z)),
    ))
);

impl Registers for Avx512 {
    type Wide = Zmm;
    type Narrow = Xmm;
    type Single = Floats<1>;

    #[inline(always)]
    fn wide(self) -> Zmm {
        Zmm(self)
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

impl Level for Avx512 {
    fn attend<E: Element>(self, job: &Job<E>, task: Task, scratch: &mut Scratch) {
        #[target_feature(enable = "avx2,fma,avx512f,avx512vl,avx512bw,avx512dq")]
        fn compiled<E: Element>(level: Avx512, job: &Job<E>, task: Task, scratch: &mut Scratch) {
            attend(level, Vectors::<_, 8, 2, 4>(level), job, task, scratch);
        }
        // SAFETY: `self` is the proof that this CPU has these features.
        unsafe { compiled(self, job, task, scratch) }
    }
}
