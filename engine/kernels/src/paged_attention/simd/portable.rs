//! Owns the kernels' arithmetic in plain Rust, for any CPU.
//!
//! Invariant: it needs no instruction beyond the target's baseline, and the compiler vectorises it. One rounding for
//! `a * b + c` is part of the definition; where the baseline lacks the instruction it is a library call, unless the
//! CPU has it nonetheless.

use crate::isa;
use crate::paged_attention::attend::{Job, attend};
use crate::paged_attention::element::Element;
use crate::paged_attention::lanes::{Lanes, MASKED, Registers};
use crate::paged_attention::level::Level;
use crate::paged_attention::plan::Task;
use crate::paged_attention::products::Vectors;
use crate::paged_attention::workspace::Scratch;

/// Plain Rust, with or without the proof that this CPU has FMA.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Portable {
    has_fma: bool,
}

impl Portable {
    /// The baseline, with FMA where the CPU has it.
    pub(in super::super) fn detect() -> Self {
        Self { has_fma: isa::has_fma() }
    }

    /// The baseline only.
    #[cfg(test)]
    pub(in super::super) fn baseline() -> Self {
        Self { has_fma: false }
    }
}

/// `N` floats.
#[derive(Clone, Copy)]
pub(in super::super) struct Floats<const N: usize>;

#[inline(always)]
fn zip<const N: usize>(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    let mut out = a;
    for i in 0..N {
        out[i] = f(a[i], b[i]);
    }
    out
}

impl<const N: usize> Lanes for Floats<N> {
    type Vector = [f32; N];
    const NUM: usize = N;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> [f32; N] {
        // SAFETY: the caller vouches for N floats; arrays of floats have the alignment of a float.
        unsafe { from.cast::<[f32; N]>().read() }
    }
    #[inline(always)]
    unsafe fn widen(self, from: *const u16) -> [f32; N] {
        // SAFETY: the caller vouches for N elements.
        let halves = unsafe { from.cast::<[u16; N]>().read() };
        halves.map(|half| f32::from_bits(u32::from(half) << 16))
    }
    #[inline(always)]
    fn iota(self) -> [f32; N] {
        std::array::from_fn(|i| i as f32)
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: [f32; N]) {
        // SAFETY: as in `load`.
        unsafe { to.cast::<[f32; N]>().write(x) }
    }
    #[inline(always)]
    fn add(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn mul_add(self, a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        let mut out = c;
        for i in 0..N {
            out[i] = a[i].mul_add(b[i], c[i]);
        }
        out
    }
    #[inline(always)]
    fn max(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        // As the instruction does it; `f32::max` takes several.
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn zero_below(self, x: [f32; N], limit: [f32; N], y: [f32; N]) -> [f32; N] {
        let mut out = y;
        for i in 0..N {
            out[i] = if x[i] < limit[i] { 0.0 } else { y[i] };
        }
        out
    }
    #[inline(always)]
    fn hide(self, score: [f32; N], position: [f32; N], visible: [f32; N]) -> [f32; N] {
        let mut out = score;
        for i in 0..N {
            out[i] = if position[i] < visible[i] { score[i] } else { MASKED };
        }
        out
    }
    #[inline(always)]
    fn add_exponent(self, y: [f32; N], z: [f32; N]) -> [f32; N] {
        zip(y, z, |y, z| f32::from_bits(y.to_bits().wrapping_add(z.to_bits() << 23)))
    }
}

impl Registers for Portable {
    type Wide = Floats<4>;
    type Narrow = Floats<4>;
    type Single = Floats<1>;

    fn wide(self) -> Floats<4> {
        Floats
    }
    fn narrow(self) -> Floats<4> {
        Floats
    }
    fn single(self) -> Floats<1> {
        Floats
    }
}

impl Level for Portable {
    fn attend<E: Element>(self, job: &Job<E>, task: Task, scratch: &mut Scratch) {
        #[cfg(target_arch = "x86_64")]
        if self.has_fma {
            #[target_feature(enable = "fma")]
            fn compiled<E: Element>(level: Portable, job: &Job<E>, task: Task, scratch: &mut Scratch) {
                attend(level, Vectors::<_, 4, 2, 2>(level), job, task, scratch);
            }
            // SAFETY: `self` is the proof that this CPU has FMA.
            return unsafe { compiled(self, job, task, scratch) };
        }
        attend(self, Vectors::<_, 4, 2, 2>(self), job, task, scratch);
    }
}
