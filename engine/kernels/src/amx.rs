//! Owns how AMX's tiles are set up and released; [`crate::isa`] says whether there are any.
//!
//! Invariant: the compiler knows nothing of tiles: each function that sets them up also releases them, unless it
//! panics, and none relies on that.

use std::arch::asm;

/// Bytes of a tile's row at most.
pub(super) const ROW: usize = 64;
/// Rows of a tile at most.
pub(super) const HEIGHT: usize = 16;

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
    /// [`crate::isa`] found AMX, the shapes are of tiles 0 to 7 and no larger than tiles are, and the function that
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
