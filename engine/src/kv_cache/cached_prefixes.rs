//! Owns what other threads may know of the prefix cache: about how much of a prompt it holds.
//!
//! Invariant: single atomics, written by the engine's thread alone, so reading never waits. Blocks share
//! slots and may hide one another: estimates may rest on it, and nothing that is computed.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use super::block::reusable;

/// Places for each block of the pool: with more, fewer are hidden.
const PLACES_PER_BLOCK: usize = 4;

/// A hash table that keeps one name in each slot.
#[derive(Debug)]
pub struct CachedPrefixes {
    block_size: usize,
    /// Seeded at random, so that a client cannot choose prompts that fall into one slot.
    hasher: RandomState,
    /// A power of two of them; 0 is none.
    places: Box<[AtomicU64]>,
}

impl CachedPrefixes {
    /// Nothing is cached of `num_blocks` blocks of `block_size` tokens.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        let num_places = (PLACES_PER_BLOCK * num_blocks).next_power_of_two();
        Self {
            block_size,
            hasher: RandomState::new(),
            places: (0..num_places).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Names all tokens up to the end of a block by the name of those before it, which is a salt where
    /// there are none, and its own.
    pub fn name(&self, before: u64, tokens: &[u32]) -> u64 {
        self.hasher.hash_one((before, tokens))
    }

    fn place(&self, name: u64) -> &AtomicU64 {
        &self.places[name as usize & (self.places.len() - 1)]
    }

    /// A block of this name is cached from now on.
    pub fn add(&self, name: u64) {
        self.place(name).store(name, Ordering::Relaxed);
    }

    /// It is no more.
    pub fn remove(&self, name: u64) {
        let place = self.place(name);
        if place.load(Ordering::Relaxed) == name {
            place.store(0, Ordering::Relaxed);
        }
    }

    /// About how many tokens of `prompt` need not be computed. As [`super::BlockTable::adopt`].
    pub fn num_cached_tokens(&self, salt: u64, prompt: &[u32]) -> usize {
        let mut name = salt;
        let mut num_blocks = 0;
        for (index, chunk) in reusable(prompt, self.block_size).enumerate() {
            name = self.name(name, chunk);
            // Whatever is hidden before it is there: of a prefix the end is forgotten first.
            if self.place(name).load(Ordering::Relaxed) == name {
                num_blocks = index + 1;
            }
        }
        num_blocks * self.block_size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_known_prefix_counts_but_for_the_last_token() {
        // The hash differs from table to table: one in which neither hides the other.
        let (cached, first, second) = loop {
            let cached = CachedPrefixes::new(8, 2);
            let first = cached.name(0, &[1, 2]);
            let second = cached.name(first, &[3, 4]);
            if !std::ptr::eq(cached.place(first), cached.place(second)) {
                break (cached, first, second);
            }
        };
        cached.add(first);
        assert_eq!(cached.num_cached_tokens(0, &[1, 2, 3, 4, 5]), 2);
        cached.add(second);
        assert_eq!(cached.num_cached_tokens(0, &[1, 2, 3, 4, 5]), 4);
        assert_eq!(cached.num_cached_tokens(0, &[1, 2, 3, 4]), 2);
        assert_eq!(cached.num_cached_tokens(0, &[9, 2, 3, 4, 5]), 0);
        assert_eq!(cached.num_cached_tokens(1, &[1, 2, 3, 4, 5]), 0);
        cached.remove(first);
        assert_eq!(cached.num_cached_tokens(0, &[1, 2, 3, 4, 5]), 4, "it may be hidden only");
        cached.remove(second);
        assert_eq!(cached.num_cached_tokens(0, &[1, 2, 3, 4, 5]), 0);
    }
}
