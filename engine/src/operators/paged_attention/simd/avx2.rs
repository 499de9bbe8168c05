//! Owns the kernels' arithmetic in AVX2 and FMA: 16 registers of 8 floats.
//!
//! Invariant: a value of [`Avx2`] exists only on a CPU that has both.

use std::arch::x86_64::*;

use super::portable::Floats;
use super::{Lanes, Level, x86_lanes};
use crate::operators::paged_attention::attend::{Job, Task, attend};
use crate::operators::paged_attention::element::Element;
use crate::operators::paged_attention::products::Vectors;
use crate::operators::paged_attention::workspace::Scratch;

/// The proof that this CPU has AVX2 and FMA.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Avx2(());

impl Avx2 {
    /// The proof, if there is one.
    pub(in super::super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
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

/// One float, with the fused multiplication of its wider kin.
#[derive(Clone, Copy)]
pub(in super::super) struct Fused(());

impl Lanes for Fused {
    type Vector = [f32; 1];
    const NUM: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 1] {
        [x]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> [f32; 1] {
        // SAFETY: the caller vouches for one float.
        unsafe { Floats::<1>.load(from) }
    }
    #[inline(always)]
    unsafe fn widen(self, from: *const u16) -> [f32; 1] {
        // SAFETY: the caller vouches for one element.
        unsafe { Floats::<1>.widen(from) }
    }
    #[inline(always)]
    fn iota(self) -> [f32; 1] {
        Floats::<1>.iota()
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: [f32; 1]) {
        // SAFETY: the caller vouches for one float.
        unsafe { Floats::<1>.store(to, x) }
    }
    #[inline(always)]
    fn add(self, a: [f32; 1], b: [f32; 1]) -> [f32; 1] {
        Floats::<1>.add(a, b)
    }
    #[inline(always)]
    fn sub(self, a: [f32; 1], b: [f32; 1]) -> [f32; 1] {
        Floats::<1>.sub(a, b)
    }
    #[inline(always)]
    fn mul(self, a: [f32; 1], b: [f32; 1]) -> [f32; 1] {
        Floats::<1>.mul(a, b)
    }
    #[inline(always)]
    fn mul_add(self, a: [f32; 1], b: [f32; 1], c: [f32; 1]) -> [f32; 1] {
        [a[0].mul_add(b[0], c[0])]
    }
    #[inline(always)]
    fn max(self, a: [f32; 1], b: [f32; 1]) -> [f32; 1] {
        Floats::<1>.max(a, b)
    }
    #[inline(always)]
    fn zero_below(self, x: [f32; 1], limit: [f32; 1], y: [f32; 1]) -> [f32; 1] {
        Floats::<1>.zero_below(x, limit, y)
    }
    #[inline(always)]
    fn hide(self, score: [f32; 1], position: [f32; 1], visible: [f32; 1]) -> [f32; 1] {
        Floats::<1>.hide(score, position, visible)
    }
    #[inline(always)]
    fn add_exponent(self, y: [f32; 1], z: [f32; 1]) -> [f32; 1] {
        Floats::<1>.add_exponent(y, z)
    }
}

impl Level for Avx2 {
    type Wide = Ymm;
    type Narrow = Xmm;
    type Single = Fused;

    #[inline(always)]
    fn wide(self) -> Ymm {
        Ymm(self)
    }
    #[inline(always)]
    fn narrow(self) -> Xmm {
        Xmm(self)
    }
    #[inline(always)]
    fn single(self) -> Fused {
        Fused(())
    }
    fn attend<E: Element>(self, job: &Job<E>, task: Task, scratch: &mut Scratch) {
        #[target_feature(enable = "avx2,fma")]
        fn compiled<E: Element>(level: Avx2, job: &Job<E>, task: Task, scratch: &mut Scratch) {
            attend(level, Vectors::<_, 4, 2, 2>(level), job, task, scratch);
        }
        // SAFETY: `self` is the proof that this CPU has AVX2 and FMA.
        unsafe { compiled(self, job, task, scratch) }
    }
}
