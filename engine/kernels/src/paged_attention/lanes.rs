//! Owns the vector operations that the kernels are written in, and their x86 implementation.
//!
//! Invariant: lane types round every operation alike, whatever their width and instruction set, so a value's bits do
//! not depend on what computed it. Only AMX's tiles, which multiply bfloat16, give other bits.

/// Score of a key that a row must not see. Finite, so that differences of scores are never NaN.
pub(super) const MASKED: f32 = -1e30;

/// Vectors of `NUM` floats. The value stands for the proof that this CPU can compute with them, so
/// arithmetic is safe to call. All functions are to be inlined into a function that is compiled for the instruction set.
pub(super) trait Lanes: Copy {
    /// The vector.
    type Vector: Copy;
    /// Floats in a vector.
    const NUM: usize;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::Vector;
    /// Reads a vector, which need not be aligned.
    ///
    /// # Safety
    /// `from` is valid for reading `NUM` floats.
    unsafe fn load(self, from: *const f32) -> Self::Vector;
    /// Reads a vector of bfloat16s: each is the upper half of a float.
    ///
    /// # Safety
    /// `from` is valid for reading `NUM` of them.
    unsafe fn widen(self, from: *const u16) -> Self::Vector;
    /// 0, 1, 2, ...
    fn iota(self) -> Self::Vector;
    /// Writes a vector, which need not be aligned.
    ///
    /// # Safety
    /// `to` is valid for writing `NUM` floats.
    unsafe fn store(self, to: *mut f32, x: Self::Vector);
    /// `a + b`.
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a - b`.
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b`.
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c` in one rounding.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The larger of each pair.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `y`, or +0 in lanes where `x < limit`.
    fn zero_below(self, x: Self::Vector, limit: Self::Vector, y: Self::Vector) -> Self::Vector;
    /// `score`, or [`MASKED`] in lanes where not `position < visible`.
    fn hide(self, score: Self::Vector, position: Self::Vector, visible: Self::Vector) -> Self::Vector;
    /// `y` with the low bits of `z`'s pattern added to its exponent.
    fn add_exponent(self, y: Self::Vector, z: Self::Vector) -> Self::Vector;
}

/// The vectors of an instruction set, by width.
pub(super) trait Registers: Copy {
    /// The widest vectors.
    type Wide: Lanes;
    /// Vectors of 4.
    type Narrow: Lanes;
    /// One float, for what is left.
    type Single: Lanes;
    /// The widest vectors.
    fn wide(self) -> Self::Wide;
    /// Vectors of 4.
    fn narrow(self) -> Self::Narrow;
    /// One float.
    fn single(self) -> Self::Single;
}

/// Implements [`Lanes`] over x86 intrinsics; masks and widening differ between AVX2 and AVX-512.
#[cfg(target_arch = "x86_64")]
macro_rules! x86_lanes {
    (
        $name:ident($proof:ty), $vector:ty, $num:literal,
        $splat:ident, $load:ident, $store:ident, $add:ident, $sub:ident, $mul:ident, $mul_add:ident, $max:ident,
        |$half:ident| $widen:expr,
        |$x:ident, $limit:ident, $y:ident| $zero_below:expr,
        |$score:ident, $position:ident, $visible:ident, $masked:ident| $hide:expr,
        |$value:ident, $bits:ident| $add_exponent:expr
    ) => {
        #[doc = concat!("Vectors of ", stringify!($num), " floats.")]
        #[derive(Clone, Copy)]
        pub(in super::super) struct $name(pub(super) $proof);

        // SAFETY of every block below: `self` holds the proof that the CPU has the instructions.
        impl $crate::paged_attention::lanes::Lanes for $name {
            type Vector = $vector;
            const NUM: usize = $num;

            #[inline(always)]
            fn splat(self, x: f32) -> $vector {
                // SAFETY: see above.
                unsafe { $splat(x) }
            }
            #[inline(always)]
            unsafe fn load(self, from: *const f32) -> $vector {
                // SAFETY: see above; the caller vouches for `from`.
                unsafe { $load(from) }
            }
            #[inline(always)]
            unsafe fn widen(self, $half: *const u16) -> $vector {
                // SAFETY: see above; the caller vouches for the address.
                unsafe { $widen }
            }
            #[inline(always)]
            fn iota(self) -> $vector {
                const NUMBERS: [f32; 16] =
                    [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
                // SAFETY: see above; no level has more lanes.
                unsafe { $load(NUMBERS.as_ptr()) }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut f32, x: $vector) {
                // SAFETY: see above; the caller vouches for `to`.
                unsafe { $store(to, x) }
            }
            #[inline(always)]
            fn add(self, a: $vector, b: $vector) -> $vector {
                // SAFETY: see above.
                unsafe { $add(a, b) }
            }
            #[inline(always)]
            fn sub(self, a: $vector, b: $vector) -> $vector {
                // SAFETY: see above.
                unsafe { $sub(a, b) }
            }
            #[inline(always)]
            fn mul(self, a: $vector, b: $vector) -> $vector {
                // SAFETY: see above.
                unsafe { $mul(a, b) }
            }
            #[inline(always)]
            fn mul_add(self, a: $vector, b: $vector, c: $vector) -> $vector {
                // SAFETY: see above.
                unsafe { $mul_add(a, b, c) }
            }
            #[inline(always)]
            fn max(self, a: $vector, b: $vector) -> $vector {
                // SAFETY: see above.
                unsafe { $max(a, b) }
            }
            #[inline(always)]
            fn zero_below(self, $x: $vector, $limit: $vector, $y: $vector) -> $vector {
                // SAFETY: see above.
                unsafe { $zero_below }
            }
            #[inline(always)]
            fn hide(self, $score: $vector, $position: $vector, $visible: $vector) -> $vector {
                let $masked = self.splat($crate::paged_attention::lanes::MASKED);
                // SAFETY: see above.
                unsafe { $hide }
            }
            #[inline(always)]
            fn add_exponent(self, $value: $vector, $bits: $vector) -> $vector {
                // SAFETY: see above.
                unsafe { $add_exponent }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use x86_lanes;
