//! Owns what the operators' tests share: random numbers, threads and the levels of this CPU.
//!
//! Invariant: a seed gives the same numbers on every machine.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::isa;
use crate::parallel::Parallel;

/// The levels that this CPU has, by name, and a word about the others.
pub(super) fn levels<T>(named: impl Fn(&str) -> Option<T>) -> impl Iterator<Item = (&'static str, T)> {
    isa::NAMES.into_iter().filter_map(move |name| {
        let level = named(name);
        if level.is_none() {
            println!("SKIPPED: this CPU does not have {name}");
        }
        Some((name, level?))
    })
}

/// Splitmix64: small, and good enough for shapes and noise.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// From 0 to `limit - 1`.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
    /// One of `choices`.
    pub(super) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
    /// Near -2 to 2.
    pub(super) fn noise(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 22) as f32 - 2.0
    }
    pub(super) fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }
}

/// Threads of a test; they take calls in whatever order they get to them.
pub(super) struct Threads(pub(super) usize);

impl Parallel for Threads {
    fn num_threads(&self) -> usize {
        self.0
    }
    fn run(&self, total: usize, f: &(dyn Fn(usize) + Sync)) -> Result<(), String> {
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                match next.fetch_add(1, Ordering::Relaxed) {
                    i if i < total => f(i),
                    _ => break,
                }
            }
        };
        if self.0 == 1 {
            // A scope allocates, which the count of the kernel's allocations must not see.
            work();
            return Ok(());
        }
        std::thread::scope(|scope| {
            // Joined by hand, which a thread sanitizer sees; how a scope waits for them it does not.
            let others: Vec<_> = (1..self.0).map(|_| scope.spawn(work)).collect();
            work();
            others.into_iter().for_each(|other| other.join().unwrap());
        });
        Ok(())
    }
}
