//! Owns what a node computes: its attributes, and the sizes that follow from them.
//!
//! Invariant: a [`Product`] that exists has whole blocks and a format that the kernels know.

use super::packing::{COLUMNS, Format, HALF};

/// Larger than any size of a network; products of two stay far from overflow.
const MAX_SIZE: i64 = 1 << 24;

/// A matrix, packed, and what is done to its products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Product {
    /// Width of the rows that are multiplied.
    pub(super) k: usize,
    /// Rows of the matrix.
    pub(super) n: usize,
    pub(super) format: Format,
    /// Whether the output is silu(first half) * second half.
    pub(super) swiglu: bool,
}

impl Product {
    /// Reads a node's attributes: `int` and `text` find one by its name.
    ///
    /// # Errors
    /// Names the attribute that is missing or wrong.
    pub(super) fn check(
        int: impl Fn(&str) -> Option<i64>,
        text: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let size = |name| size(&int, name);
        let (k, n) = (size("K")?, size("N")?);
        let format = Format { bits: size("bits")?, block_size: size("block_size")? };
        let swiglu = match text("epilogue").as_deref() {
            None | Some("none") => false,
            Some("swiglu") => true,
            Some(other) => return Err(format!("epilogue is {other:?}, not none or swiglu")),
        };
        Self::new(k, n, format, swiglu)
    }

    /// A product that the kernels know.
    ///
    /// # Errors
    /// Names the size that is wrong.
    pub(super) fn new(k: usize, n: usize, format: Format, swiglu: bool) -> Result<Self, String> {
        if ![4, 8].contains(&format.bits) {
            return Err(format!("bits is {}, not 4 or 8", format.bits));
        }
        if ![32, 64, 128, 256, 512].contains(&format.block_size) {
            return Err(format!("block_size is {}, not 32, 64, 128, 256 or 512", format.block_size));
        }
        if !k.is_multiple_of(format.block_size) {
            return Err(format!("K {k} is not a multiple of block_size {}", format.block_size));
        }
        if swiglu && n % 2 == 1 {
            return Err(format!("N {n} is odd, epilogue swiglu needs two halves"));
        }
        Ok(Self { k, n, format, swiglu })
    }

    /// Columns of the output.
    pub(super) fn width(self) -> usize {
        if self.swiglu { self.n / 2 } else { self.n }
    }

    /// Columns of the output that a panel gives.
    pub(super) fn panel_width(self) -> usize {
        if self.swiglu { HALF } else { COLUMNS }
    }

    /// Panels of the matrix.
    pub(super) fn num_panels(self) -> usize {
        self.width().div_ceil(self.panel_width())
    }

    /// Bytes of a panel.
    pub(super) fn panel_bytes(self) -> usize {
        self.format.panel_bytes(self.k)
    }
}

/// The attribute `name`, of those that `int` finds: a size.
///
/// # Errors
/// Names it if it is missing or wrong.
pub(super) fn size(int: impl Fn(&str) -> Option<i64>, name: &str) -> Result<usize, String> {
    match int(name) {
        Some(value) if (1..=MAX_SIZE).contains(&value) => Ok(value as usize),
        Some(value) => Err(format!("{name} is {value}")),
        None => Err(format!("{name} is missing")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(changes: &[(&str, i64)], epilogue: Option<&str>) -> Result<Product, String> {
        let node = [("K", 96), ("N", 50), ("bits", 4), ("block_size", 32)];
        let find = |name: &str| {
            let all = changes.iter().chain(&node);
            all.into_iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| *value)
                .filter(|&value| value != -1)
        };
        Product::check(find, |name| epilogue.filter(|_| name == "epilogue").map(Into::into))
    }

    #[test]
    fn sizes_follow_from_attributes() {
        let plain = check(&[], None).unwrap();
        assert_eq!((plain.width(), plain.num_panels(), plain.panel_bytes()), (50, 2, 3 * 9 * 64));
        let swiglu = check(&[("bits", 8)], Some("swiglu")).unwrap();
        assert_eq!((swiglu.width(), swiglu.num_panels(), swiglu.panel_bytes()), (25, 2, 3 * 17 * 64));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let refused = [("K", 0), ("K", 80), ("N", -1), ("N", 1 << 30), ("bits", 5), ("block_size", 16)];
        for (name, value) in refused {
            let message = check(&[(name, value)], None).unwrap_err();
            assert!(message.starts_with(name), "{name}: {message}");
        }
        let message = check(&[], Some("gelu")).unwrap_err();
        assert!(message.contains("epilogue"), "{message}");
        let message = check(&[("N", 33)], Some("swiglu")).unwrap_err();
        assert!(message.starts_with("N 33"), "{message}");
    }
}
