//! Owns what this CPU can do, and which instruction set an operator uses.
//!
//! Invariant: AMX is found only after Linux allowed this process the use of its tiles. All operators choose by
//! the same names, so that one variable forces the instruction set of all of them.

#[cfg(target_arch = "x86_64")]
use std::arch::asm;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__cpuid, __cpuid_count};

/// Variable that forces an instruction set: `portable`, `avx2`, `avxvnni`, `avx512` or `amx`.
pub const SIMD_VARIABLE: &str = "GLMSERVE_SIMD";

/// The names of all levels, best last.
pub(crate) const NAMES: [&str; 5] = ["portable", "avx2", "avxvnni", "avx512", "amx"];

/// The instruction set that [`SIMD_VARIABLE`] names.
pub(crate) fn forced() -> Option<String> {
    std::env::var(SIMD_VARIABLE).ok().filter(|name| !name.is_empty())
}

/// The level that `forced` names, or the best one that this CPU has, for `what`.
///
/// # Errors
/// Says that the name is unknown, or that this CPU lacks what it stands for.
pub(crate) fn choose<T>(
    what: &str,
    forced: Option<&str>,
    named: impl Fn(&str) -> Option<T>,
) -> Result<T, String> {
    let Some(name) = forced else {
        return NAMES.iter().rev().find_map(|name| named(name)).ok_or_else(|| format!("no level for {what}"));
    };
    if !NAMES.contains(&name) {
        return Err(format!("{SIMD_VARIABLE} is {name:?}, which is none of {}", NAMES.join(", ")));
    }
    named(name).ok_or_else(|| format!("{SIMD_VARIABLE} is {name}, which this CPU does not have for {what}"))
}

/// Whether products and sums in one rounding are instructions.
pub(crate) fn has_fma() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && has_fma()
}

/// Conversion of float16.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_f16c() -> bool {
    is_x86_feature_detected!("f16c")
}

/// Products of bytes that are added up in 32 bits, in registers of AVX2.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx_vnni() -> bool {
    is_x86_feature_detected!("avxvnni")
}

/// AVX-512 F, VL, BW and DQ.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
}

/// AVX-512 F, BW and VNNI.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512_vnni() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni")
}

/// AMX-BF16, with the AVX-512 that converts to bfloat16.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_amx_bf16() -> bool {
    is_x86_feature_detected!("avx512bf16") && has_amx(Numbers::Bf16)
}

/// AMX-INT8, with the GFNI that unpacks 4 bits.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_amx_int8() -> bool {
    is_x86_feature_detected!("gfni") && has_amx(Numbers::Int8)
}

/// What numbers AMX multiplies, as its bit in leaf 7's EDX.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
enum Numbers {
    Bf16 = 1 << 22,
    Int8 = 1 << 25,
}

/// Whether this process may multiply such numbers in tiles.
#[cfg(target_arch = "x86_64")]
fn has_amx(numbers: Numbers) -> bool {
    const TILE: u32 = 1 << 24;
    let features = TILE | numbers as u32;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & features == features && allowed()
}

/// Asks Linux for the memory that saves tiles at a change of threads.
#[cfg(target_arch = "x86_64")]
fn allowed() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_PRCTL: usize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const XTILEDATA: usize = 18;
        let result: isize;
        // SAFETY: a system call that changes nothing but what the process may use.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XTILEDATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        result == 0
    }
    #[cfg(not(target_os = "linux"))]
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_level_is_chosen_unless_one_is_forced() {
        let has = |wanted: &'static [&str]| move |name: &str| wanted.iter().find(|it| **it == name).copied();
        assert_eq!(choose("it", None, has(&["portable", "avx2"])), Ok("avx2"));
        assert_eq!(choose("it", Some("portable"), has(&["portable", "avx2"])), Ok("portable"));
        let lacking = choose("it", Some("amx"), has(&["portable"])).unwrap_err();
        assert!(lacking.contains("this CPU does not have for it"), "{lacking}");
        let unknown = choose("it", Some("sse9"), has(&["portable"])).unwrap_err();
        assert!(unknown.contains("none of portable, avx2"), "{unknown}");
    }
}
