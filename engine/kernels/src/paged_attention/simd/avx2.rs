//! Owns the kernels' arithmetic in AVX2 and FMA: 16 registers of 8 floats.
//!
//! Invariant: a value of [`Avx2`] exists only on a CPU that has both.

use std::arch::x86_64::*;

use super::portable::Floats;
use crate::isa;
use crate::paged_attention::attend::{Job, attend};
use crate::paged_attention::element::Element;
use crate::paged_attention::lanes::{Registers, x86_lanes};
use crate::paged_attention::level::Level;
use crate::paged_attention::plan::Task;
use crate::paged_attention::products::Vectors;
use crate::paged_attention::workspace::Scratch;

/// The proof that this CPU has AVX2 and FMA.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Avx2(());

impl Avx2 {
    /// The proof, if there is one.
    pub(in super::super) fn detect() -> Option<Self> {
        isa::has_avx2().then_some(Self(()))
    }
}

x86_lanes!(
    Ymm(Avx2),
    __m256,
    8,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_add_ps,
    _mm256_sub_ps,
    _mm256_mul_ps,
    _mm256_fmadd_ps,
    _mm256_max_ps,
    |from| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))),
    |x, limit, y| _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, limit), y),
    |score, position, visible, masked| {
        _mm256_blendv_ps(masked, score, _mm256_cmp_ps::<_CMP_LT_OQ>(position, visible))
    },
    |y, z| _mm256_castsi256_ps(_mm256_add_epi32(
        _mm256_castps_si256(y),
        _mm256_slli_epi32::<23>(_mm256_castps_si256(z)),
    ))
);

x86_lanes!(
    Xmm(Avx2),
    __m128,
    4,
    _mm_set1_ps,
    _mm_loadu_ps,
    _mm_storeu_ps,
    _mm_add_ps,
    _mm_sub_ps,
    _mm_mul_ps,
    _mm_fmadd_ps,
    _mm_max_ps,
    |from| _mm_castsi128_ps(_mm_slli_epi32::<16>(_mm_cvtepu16_epi32(_mm_loadl_epi64(from.cast())))),
    |x, limit, y| _mm_andnot_ps(_mm_cmp_ps::<_CMP_LT_OQ>(x, limit), y),
    |score, position, visible, masked| {
        _mm_blendv_ps(masked, score, _mm_cmp_ps::<_CMP_LT_OQ>(position, visible))
    },
    |y, z| _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(y), _mm_slli_epi32::<23>(_mm_castps_si128(z)),))
);

impl Registers for Avx2 {
    type Wide = Ymm;
    type Narrow = Xmm;
    type Single = Floats<1>;

    #[inline(always)]
    fn wide(self) -> Ymm {
        Ymm(self)
    }
    #[inline(always)]
    fn narrow(self) -> Xmm {
        Xmm(self)
    }
    #[inline(always)]
    fn single(self) -> Floats<1> {
        Floats
    }
}

impl Level for Avx2 {
    fn attend<E: Element>(self, job: &Job<E>, task: Task, scratch: &mut Scratch) {
        #[target_feature(enable = "avx2,fma")]
        fn compiled<E: Element>(level: Avx2, job: &Job<E>, task: Task, scratch: &mut Scratch) {
            attend(level, Vectors::<_, 4, 2, 2>(level), job, task, scratch);
        }
        // SAFETY: `self` is the proof that this CPU has AVX2 and FMA.
        unsafe { compiled(self, job, task, scratch) }
    }
}
