//! Owns the canonical form of what was read, as bytes for a hash.
//!
//! Invariant: different values have different bytes, however they follow each other: whatever varies in length says
//! its length first. How a number was written does not show: 0, 0.0 and -0.0 are one.

use std::borrow::Cow;

use sha2::{Digest, Sha256};

use super::read::Ignored;
use super::refused::Refused;

/// Something whose value can be hashed.
pub(crate) trait Canonical {
    /// Feeds its canonical form to `hasher`.
    fn feed(&self, hasher: &mut Sha256);
}

impl Canonical for bool {
    fn feed(&self, hasher: &mut Sha256) {
        hasher.update([u8::from(*self)]);
    }
}

impl Canonical for f32 {
    fn feed(&self, hasher: &mut Sha256) {
        // The sum of -0.0 and 0.0 is 0.0.
        hasher.update((self + 0.0).to_bits().to_le_bytes());
    }
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Canonical for $type {
            fn feed(&self, hasher: &mut Sha256) {
                hasher.update(self.to_le_bytes());
            }
        }
    )*};
}
integers!(u8, u32, i32, i64);

impl Canonical for usize {
    fn feed(&self, hasher: &mut Sha256) {
        hasher.update((*self as u64).to_le_bytes());
    }
}

impl Canonical for str {
    fn feed(&self, hasher: &mut Sha256) {
        self.len().feed(hasher);
        hasher.update(self);
    }
}

impl Canonical for String {
    fn feed(&self, hasher: &mut Sha256) {
        self.as_str().feed(hasher);
    }
}

impl Canonical for Cow<'_, str> {
    fn feed(&self, hasher: &mut Sha256) {
        str::feed(self, hasher);
    }
}

impl<T: Canonical> Canonical for Option<T> {
    fn feed(&self, hasher: &mut Sha256) {
        self.is_some().feed(hasher);
        if let Some(value) = self {
            value.feed(hasher);
        }
    }
}

impl<T: Canonical> Canonical for [T] {
    fn feed(&self, hasher: &mut Sha256) {
        self.len().feed(hasher);
        self.iter().for_each(|entry| entry.feed(hasher));
    }
}

impl<A: Canonical, B: Canonical> Canonical for (A, B) {
    fn feed(&self, hasher: &mut Sha256) {
        self.0.feed(hasher);
        self.1.feed(hasher);
    }
}

impl Canonical for Ignored {
    fn feed(&self, _: &mut Sha256) {}
}

impl Canonical for Refused {
    fn feed(&self, _: &mut Sha256) {}
}
