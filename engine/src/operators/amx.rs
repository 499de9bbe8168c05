//! Owns leave to use AMX: whether this CPU has it, Linux's permission, and how tiles are set up.
//!
//! Invariant: [`detect`] says yes only after Linux allowed this process the use of tiles. The compiler knows
//! nothing of them: each function that sets them up also releases them, unless it panics, and none relies on that.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};

/// Bytes of a tile's row at most.
pub(super) const ROW: usize = 64;
/// Rows of a tile at most.
pub(super) const HEIGHT: usize = 16;

/// What numbers an AMX multiplies, as its bit in leaf 7's EDX.
#[derive(Clone, Copy)]
pub(super) enum Numbers {
    Bf16 = 1 << 22,
    Int8 = 1 << 25,
}

/// Whether this process may multiply such numbers in tiles.
pub(super) fn detect(numbers: Numbers) -> bool {
    const TILE: u32 = 1 << 24;
    let features = TILE | numbers as u32;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & features == features && allowed()
}

/// Asks Linux for the memory that saves tiles at a change of threads.
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

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
pub(super) struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// Of each tile in use: its number, bytes of a row and rows.
    pub(super) fn new(tiles: impl IntoIterator<Item = (usize, usize, usize)>) -> Self {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        for (tile, bytes, num) in tiles {
            (row_bytes[tile], rows[tile]) = (bytes as u16, num as u8);
        }
        Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    }

    /// Sets tiles up.
    ///
    /// # Safety
    /// [`detect`] said yes, the shapes are of tiles 0 to 7 and no larger than tiles are; and the function that
    /// calls this calls [`release`] before it returns.
    #[inline(always)]
    pub(super) unsafe fn load(&self) {
        // SAFETY: the caller vouches for AMX and the shapes. All tiles are set to 0, which are among what the
        // convention says a call may change.
        unsafe { asm!("ldtilecfg [{}]", in(reg) self, clobber_abi("sysv64"), options(nostack, readonly)) };
    }
}

/// Lets go of the tiles.
///
/// # Safety
/// They were set up.
#[inline(always)]
pub(super) unsafe fn release() {
    // SAFETY: the caller vouches for it.
    unsafe { asm!("tilerelease", clobber_abi("sysv64"), options(nostack, nomem)) };
}
