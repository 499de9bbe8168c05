//! Owns how quantised weights lie in memory, and the view of one panel of them. `glm_export/graph/packing.py`
//! writes what is drawn here; `export/tests/golden/packing.json` holds both to it.
//!
//! ```text
//! weights  uint8 [num_panels, panel bytes]; a panel is 32 columns of the output: rows of the matrix
//! panel    | block 0 | block 1 | ... | block K / B - 1 |       B = block_size neighbours along K
//! block    | line | line | ... | line | scales |               all of 64 bytes
//! line     byte 4c + j is the code of k = 4s + j in step s of the block, s = 0 .. B / 4 - 1
//!   4 bits   one line a step: column c in the low half of the byte, column 16 + c in the high half
//!   8 bits   two lines a step: columns 0 .. 15, then columns 16 .. 31
//! scales   32 float16, one a column
//! ```
//!
//! A weight is (code - 8) * scale at 4 bits, (code - 128) * scale at 8. Columns beyond N have scale 0. With the
//! epilogue `swiglu` the first 16 columns of panel p are rows 16p.. of the gate (the matrix's first half) and the
//! others rows 16p.. of the up projection (its second half).
//!
//! Invariant: one packing serves every instruction set and any number of rows. A line is what one
//! AVX-512 register holds, and one row of an AMX tile.

/// Columns of a panel.
pub(super) const COLUMNS: usize = 32;
/// Columns of a line of 8 bits, and of each half of a line of 4.
pub(super) const HALF: usize = COLUMNS / 2;
/// Bytes of a line.
pub(super) const LINE: usize = 64;
/// Values of K that a step multiplies.
pub(super) const STEP: usize = 4;

/// 64 bytes, wherever they lie.
pub(super) type Line = [u8; LINE];

/// Bits and block size of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    /// Bits of a code: 4 or 8.
    pub(super) bits: usize,
    /// Neighbours along K that share a scale: 32, 64, 128, 256 or 512. So sums of whole numbers stay below
    /// 2^24, and float32 holds them.
    pub(super) block_size: usize,
}

impl Format {
    /// Lines of a block, that of the scales included.
    pub(super) fn block_lines(self) -> usize {
        self.block_size / STEP * self.bits / 4 + 1
    }

    /// Bytes of a panel of `k` rows.
    pub(super) fn panel_bytes(self, k: usize) -> usize {
        k / self.block_size * self.block_lines() * LINE
    }
}

/// The float16 with pattern `bits`, exactly.
#[inline(always)]
pub(super) fn half_to_float(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // The exponent moves from a bias of 15 to one of 127: a product that subnormals take part in.
    let value = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    // Infinity and NaN keep all bits of the exponent set.
    let special = if magnitude >= 0x7c00 << 13 { 0x7f80_0000 } else { 0 };
    f32::from_bits(value.to_bits() | special | sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_converted_exactly() {
        for bits in 0..=u16::MAX {
            let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
            let want = match exponent {
                0 => fraction * 2f64.powi(-24),
                31 => f64::INFINITY,
                _ => (1024.0 + fraction) * 2f64.powi(exponent - 25),
            };
            let got = half_to_float(bits);
            if exponent == 31 && fraction != 0.0 {
                assert!(got.is_nan());
            } else {
                assert_eq!(f64::from(got), if bits >> 15 == 1 { -want } else { want }, "{bits:#x}");
            }
            assert_eq!(got.is_sign_negative(), bits >> 15 == 1);
        }
    }

    #[test]
    fn sizes_are_as_drawn() {
        let bytes = |bits, block_size| Format { bits, block_size }.panel_bytes(256);
        assert_eq!(bytes(4, 32), 32 * 256 / 2 + 8 * 64);
        assert_eq!(bytes(4, 128), 32 * 256 / 2 + 2 * 64);
        assert_eq!(bytes(8, 64), 32 * 256 + 4 * 64);
    }
}
