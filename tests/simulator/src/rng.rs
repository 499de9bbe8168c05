//! Owns the tests' random numbers: small, seeded, and the same everywhere.

/// A SplitMix64 generator. A failing test prints its seed; the seed reproduces the failure.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator for `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `range`.
    pub fn range(&mut self, range: std::ops::RangeInclusive<usize>) -> usize {
        let width = (range.end() - range.start() + 1) as u64;
        range.start() + (self.next_u64() % width) as usize
    }

    /// True once in `n` times on average.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.range(1..=n) == 1
    }
}
