//! Owns this crate's random numbers: keys that nobody guesses, and jitter.

use std::hash::{BuildHasher, Hasher, RandomState};

/// A keyed hash; the key comes from the operating system.
fn random_u64() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// A key of 128 random bits for one request.
pub(crate) fn key() -> String {
    format!("{:016x}{:016x}", random_u64(), random_u64())
}

/// A number from 0 to 1, 1 excluded.
pub(crate) fn fraction() -> f64 {
    // As many bits as a double holds exactly.
    (random_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_and_fractions_stay_below_one() {
        assert_eq!(key().len(), 32);
        assert_ne!(key(), key());
        assert!((0..1000).all(|_| (0.0..1.0).contains(&fraction())));
    }
}
