//! Owns the choice of an instruction set.
//!
//! Invariant: it changes no bit of any result, only the time it takes.

pub(super) mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;

use super::activations::Activations;
use super::multiply::{Call, run};
use crate::isa;
use crate::parallel::Parallel;

/// The instruction set that a kernel uses. A value exists only if this CPU has it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Simd {
    Portable(portable::Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2<false>),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(avx2::Avx2<true>),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(target_arch = "x86_64")]
    Amx(amx::Amx),
}

impl Simd {
    /// The level called `name`, if this CPU has it.
    pub(super) fn named(name: &str) -> Option<Self> {
        match name {
            "portable" => Some(Self::Portable(portable::Portable)),
            #[cfg(target_arch = "x86_64")]
            "avx2" => avx2::Avx2::detect().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            "avxvnni" => avx2::Avx2::detect().map(Self::AvxVnni),
            #[cfg(target_arch = "x86_64")]
            "avx512" => avx512::Avx512::detect().map(Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            "amx" => amx::Amx::detect().map(Self::Amx),
            _ => None,
        }
    }

    /// The level that `forced` names, or the best one of this CPU.
    ///
    /// # Errors
    /// As [`isa::choose`].
    pub(super) fn choose(forced: Option<&str>) -> Result<Self, String> {
        isa::choose("the product of quantised weights", forced, Self::named)
    }

    /// Computes `calls`; see [`run`].
    ///
    /// # Errors
    /// As [`run`].
    pub(super) fn run<const NUM: usize>(
        self,
        calls: &[Call; NUM],
        activations: &mut Activations,
        threads: &impl Parallel,
    ) -> Result<(), String> {
        match self {
            Self::Portable(level) => run(level, calls, activations, threads),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(level) => run(level, calls, activations, threads),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(level) => run(level, calls, activations, threads),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(level) => run(level, calls, activations, threads),
            #[cfg(target_arch = "x86_64")]
            Self::Amx(level) => run(level, calls, activations, threads),
        }
    }
}
