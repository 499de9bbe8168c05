//! Owns the server's random numbers: names of replies, seeds for requests that bring none.

use std::hash::{BuildHasher, Hasher, RandomState};

/// A number that no client can guess from earlier ones: a keyed hash, the key from the operating system.
pub(crate) fn random_u64() -> u64 {
    RandomState::new().build_hasher().finish()
}
