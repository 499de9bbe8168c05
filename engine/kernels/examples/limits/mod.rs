//! Owns what this machine can do at most, by plain loops: read main memory, and compute in registers.
//!
//! Invariant: what this CPU cannot do is none, never zero.

#![allow(clippy::disallowed_methods, reason = "a probe owns its clock")]
#![allow(dead_code, reason = "each bench has its own use for it")]

use std::hint::black_box;
use std::time::{Duration, Instant};

/// Bytes that each thread reads: about what a model's weights take, and more than a core's own caches hold.
const BYTES: usize = 192 << 20;
const READ_PASSES: usize = 4;
const ARITHMETIC: Duration = Duration::from_millis(60);
/// How far ahead memory is asked for, in cache lines: farther than the processor itself looks.
const LINES_AHEAD: usize = 32;

/// 10^9 operations a second in float32, in AVX-512.
pub(crate) fn fp32_gflops(num_threads: usize) -> Option<f64> {
    x86::fp32().map(|kernel| giga_ops_per_s(num_threads, kernel))
}

/// 10^9 operations a second of whole numbers of 8 bits, in AVX-512 with VNNI.
pub(crate) fn int8_vnni_gops(num_threads: usize) -> Option<f64> {
    x86::int8_vnni().map(|kernel| giga_ops_per_s(num_threads, kernel))
}

/// 10^9 operations a second of whole numbers of 8 bits, in AMX.
pub(crate) fn int8_amx_gops(num_threads: usize) -> Option<f64> {
    x86::int8_amx().map(|kernel| giga_ops_per_s(num_threads, kernel))
}

/// 10^9 operations a second of bfloat16, in AMX.
pub(crate) fn bf16_amx_gflops(num_threads: usize) -> Option<f64> {
    x86::bf16_amx().map(|kernel| giga_ops_per_s(num_threads, kernel))
}

/// The best of a few passes over one buffer a thread, in 10^9 bytes a second.
pub(crate) fn read_gb_per_s(num_threads: usize) -> f64 {
    let buffers: Vec<Vec<Line>> = (0..num_threads).map(|_| buffer()).collect();
    let pass = || {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for buffer in &buffers {
                scope.spawn(|| black_box(read(buffer)));
            }
        });
        started.elapsed()
    };
    let best = (0..READ_PASSES).map(|_| pass()).min().unwrap_or_default();
    (num_threads * BYTES) as f64 / best.as_secs_f64() / 1e9
}

/// A cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u64; 8]);

/// In large pages where the system has them, as the engine's weights are.
fn buffer() -> Vec<Line> {
    let mut buffer: Vec<Line> = Vec::with_capacity(BYTES / size_of::<Line>());
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let start: *mut u8 = buffer.as_mut_ptr().cast();
        let first = start.align_offset(PAGE);
        // SAFETY: advice on whole pages of the buffer's own memory; it may be refused.
        unsafe {
            libc::madvise(start.add(first).cast(), (BYTES - first) / PAGE * PAGE, libc::MADV_HUGEPAGE);
        }
    }
    // Not zero: pages that were never written are all the same one.
    buffer.resize(BYTES / size_of::<Line>(), Line([1; 8]));
    buffer
}

fn read(buffer: &[Line]) -> u64 {
    let mut sums = [0; 8];
    for line in buffer {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: prefetching touches nothing, wherever it points.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).wrapping_add(LINES_AHEAD).cast());
        }
        for (sum, value) in sums.iter_mut().zip(line.0) {
            *sum ^= value;
        }
    }
    sums.into_iter().fold(0, |all, sum| all ^ sum)
}

/// A burst of instructions that touch no memory; returns how many operations it did.
type Kernel = fn() -> u64;

/// All threads together, each counted over its own time.
fn giga_ops_per_s(num_threads: usize, kernel: Kernel) -> f64 {
    let one = || {
        kernel();
        let started = Instant::now();
        let mut num_operations = 0;
        while started.elapsed() < ARITHMETIC {
            num_operations += kernel();
        }
        num_operations as f64 / started.elapsed().as_secs_f64() / 1e9
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..num_threads).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(0.0)).sum()
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::Kernel;

    const ROUNDS: u64 = 20_000;
    /// Enough chains to hide each instruction's latency; they fit in the registers.
    const CHAINS: usize = 12;

    pub(super) fn fp32() -> Option<Kernel> {
        // SAFETY: it runs only where the CPU has AVX-512.
        is_x86_feature_detected!("avx512f").then_some(|| unsafe { fp32_burst() })
    }

    pub(super) fn int8_vnni() -> Option<Kernel> {
        let found = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
        // SAFETY: it runs only where the CPU has both.
        found.then_some(|| unsafe { vnni_burst() })
    }

    pub(super) fn int8_amx() -> Option<Kernel> {
        // SAFETY: it runs only where CPU and kernel allow tiles.
        amx(25).then_some(|| unsafe { int8_burst() })
    }

    pub(super) fn bf16_amx() -> Option<Kernel> {
        // SAFETY: as above.
        amx(22).then_some(|| unsafe { bf16_burst() })
    }

    /// Leaf 7's EDX tells of tiles (bit 24) and of their products; the kernel must agree.
    fn amx(products: u32) -> bool {
        let features = 1 << 24 | 1 << products;
        __cpuid_count(7, 0).edx & features == features && kernel_allows_tiles()
    }

    #[target_feature(enable = "avx512f")]
    fn fp32_burst() -> u64 {
        let factor = black_box(_mm512_set1_ps(0.5));
        let mut sums = [factor; CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        ROUNDS * CHAINS as u64 * 16 * 2
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn vnni_burst() -> u64 {
        let factor = black_box(_mm512_set1_epi8(1));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, factor, factor);
            }
        }
        black_box(sums);
        ROUNDS * CHAINS as u64 * 64 * 2
    }

    /// Linux saves the tiles of a process only after it asked for them.
    fn kernel_allows_tiles() -> bool {
        const ARCH_PRCTL: i64 = 158;
        const REQUEST_PERMISSION: i64 = 0x1023;
        const TILE_DATA: i64 = 18;
        let result: i64;
        // SAFETY: the call changes a permission of this process and no memory.
        unsafe {
            asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") REQUEST_PERMISSION,
                 in("rsi") TILE_DATA, out("rcx") _, out("r11") _);
        }
        result == 0
    }

    /// The shape of all eight tiles: 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct TileConfig([u8; 64]);

    impl TileConfig {
        const FULL: Self = {
            let mut bytes = [0; 64];
            bytes[0] = 1;
            let mut tile = 0;
            while tile < 8 {
                bytes[16 + 2 * tile] = 64;
                bytes[48 + tile] = 16;
                tile += 1;
            }
            Self(bytes)
        };
    }

    /// A burst of a product of 16 rows of 64 bytes, each of `$num` numbers, with 16 columns.
    macro_rules! amx_burst {
        ($name:ident, $multiply:literal, $num:literal) => {
            /// Must be called only where CPU and kernel allow tiles. The compiler has no stable words for them.
            unsafe fn $name() -> u64 {
                let config = TileConfig::FULL;
                // SAFETY: the caller has tiles; all eight are declared overwritten and released at the end.
                unsafe {
                    asm!(
                        "ldtilecfg [{config}]",
                        "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                        "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                        "2:",
                        concat!($multiply, " tmm0, tmm4, tmm6"),
                        concat!($multiply, " tmm1, tmm4, tmm7"),
                        concat!($multiply, " tmm2, tmm5, tmm6"),
                        concat!($multiply, " tmm3, tmm5, tmm7"),
                        "dec {rounds}",
                        "jnz 2b",
                        "tilerelease",
                        config = in(reg) &config,
                        rounds = inout(reg) ROUNDS => _,
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack),
                    );
                }
                ROUNDS * 4 * 16 * $num * 16 * 2
            }
        };
    }
    amx_burst!(int8_burst, "tdpbssd", 64);
    amx_burst!(bf16_burst, "tdpbf16ps", 32);
}

#[cfg(not(target_arch = "x86_64"))]
mod x86 {
    use super::Kernel;

    pub(super) fn fp32() -> Option<Kernel> {
        None
    }

    pub(super) fn int8_vnni() -> Option<Kernel> {
        None
    }

    pub(super) fn int8_amx() -> Option<Kernel> {
        None
    }

    pub(super) fn bf16_amx() -> Option<Kernel> {
        None
    }
}
