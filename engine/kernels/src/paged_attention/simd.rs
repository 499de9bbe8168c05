//! Owns the choice of an instruction set.
//!
//! Invariant: a value of [`Simd`] exists only if this CPU has the instructions.

pub(super) mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;

use super::attend::Job;
use super::batch::Geometry;
use super::element::Element;
use super::level::Level;
use super::plan::Task;
#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::workspace::Scratch;
use crate::isa;

/// The instruction set that a kernel uses. A value exists only if this CPU has it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Simd {
    Portable(portable::Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(target_arch = "x86_64")]
    Amx(amx::Amx),
}

impl Simd {
    /// The level called `name`, if this CPU has it. What AVX-VNNI adds is for whole numbers only.
    pub(super) fn named(name: &str) -> Option<Self> {
        match name {
            "portable" => Some(Self::Portable(portable::Portable::detect())),
            #[cfg(target_arch = "x86_64")]
            "avx2" | "avxvnni" => avx2::Avx2::detect().map(Self::Avx2),
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
        isa::choose("attention", forced, Self::named)
    }

    /// Whether a cache of this geometry is to lie as tiles want it: see [`super::kv_cache`].
    pub(super) fn wants_tiles<E: Element>(self, geometry: &Geometry) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => tiles::suit::<E>(geometry),
            _ => false,
        }
    }

    /// Computes `task`.
    pub(super) fn attend<E: Element>(self, job: &Job<E>, task: Task, scratch: &mut Scratch) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(level) => level.attend(job, task, scratch),
            Self::Portable(level) => level.attend(job, task, scratch),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(level) => level.attend(job, task, scratch),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(level) => level.attend(job, task, scratch),
        }
    }
}
