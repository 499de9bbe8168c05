//! Owns the threads that operators compute with: those that ONNX Runtime's session has anyway.
//!
//! Invariant: no panic reaches ONNX Runtime, which is not Rust.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, TryLockError};

use ort::operator::ComputeContext;

/// How often a thread looks whether the others are ready before it lets the system run something else.
const SPINS: usize = 10_000;

/// Threads to compute with.
pub(super) trait Parallel {
    /// About how many there are.
    fn num_threads(&self) -> usize;
    /// Calls `f` with 0 to `total - 1`, in any order and at the same time.
    ///
    /// # Errors
    /// Whatever the threads' owner reports.
    fn run(&self, total: usize, f: &(dyn Fn(usize) + Sync)) -> Result<(), String>;
}

/// ONNX Runtime's own threads.
pub(super) struct SessionThreads<'a> {
    pub(super) ctx: &'a ComputeContext,
    pub(super) num_threads: usize,
}

impl Parallel for SessionThreads<'_> {
    fn num_threads(&self) -> usize {
        self.num_threads
    }
    fn run(&self, total: usize, f: &(dyn Fn(usize) + Sync)) -> Result<(), String> {
        // 0 lets ONNX Runtime hand out the calls one by one.
        self.ctx.par_for(total, 0, f).map_err(|e| e.to_string())
    }
}

/// `num_threads`, where 0 stands for one a core.
pub(super) fn threads_of_session(num_threads: usize) -> usize {
    match num_threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        some => some,
    }
}

/// Numbers that a thread takes from the front, in order, as long as others leave it some; they take from the
/// back. A line of its own, since each is one thread's most of the time.
#[repr(align(64))]
pub(super) struct Stretch(AtomicU64);

impl Stretch {
    /// `start` to `end - 1`, which fits 32 bits.
    pub(super) fn new(start: usize, end: usize) -> Self {
        assert!(start <= end && u32::try_from(end).is_ok(), "{start} to {end}");
        Self(AtomicU64::new((start as u64) << 32 | end as u64))
    }

    pub(super) fn take_first(&self) -> Option<usize> {
        self.take(|start, end| (start, start + 1, end))
    }

    pub(super) fn take_last(&self) -> Option<usize> {
        self.take(|start, end| (end - 1, start, end - 1))
    }

    /// What `part` takes first, and what it leaves.
    fn take(&self, part: impl Fn(u64, u64) -> (u64, u64, u64)) -> Option<usize> {
        let cut = |both: u64| {
            let (start, end) = (both >> 32, both & u64::from(u32::MAX));
            (start < end).then(|| part(start, end))
        };
        let leave = |both| cut(both).map(|(_, start, end)| start << 32 | end);
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, leave).ok()?;
        cut(before).map(|(taken, ..)| taken as usize)
    }
}

/// A part of a call that is over before any thread goes on to the next.
#[derive(Default)]
pub(super) struct Phase {
    taken: AtomicUsize,
    done: AtomicUsize,
}

impl Phase {
    /// Calls `f` with what is left of 0 to `total - 1`, and returns when all of that is done, by whichever
    /// thread. It returns even if threads run one after the other: who takes a number is at work on it.
    pub(super) fn run(&self, total: usize, guard: &Guard, f: impl Fn(usize)) {
        loop {
            let i = self.taken.fetch_add(1, Ordering::Relaxed);
            if i >= total {
                break;
            }
            guard.call(|| f(i));
            // A task that panicked counts as done: no thread waits for it, and the call fails.
            self.add_done(1);
        }
        self.wait(total);
    }

    /// So many more parts are done.
    pub(super) fn add_done(&self, num: usize) {
        self.done.fetch_add(num, Ordering::Release);
    }

    /// Returns when `total` parts are done.
    pub(super) fn wait(&self, total: usize) {
        let mut spins = 0;
        while self.done.load(Ordering::Acquire) < total {
            spins += 1;
            if spins % SPINS == 0 {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }
}

/// Catches panics of tasks on any thread, to report them when all are done.
#[derive(Default)]
pub(super) struct Guard(AtomicBool);

impl Guard {
    /// Calls `f`.
    pub(super) fn call(&self, f: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(f)).is_err() {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// # Errors
    /// When a task panicked.
    pub(super) fn finish(self) -> Result<(), String> {
        match self.0.into_inner() {
            true => Err("a task panicked".into()),
            false => Ok(()),
        }
    }
}

/// Calls `f` with the memory that the kernels of a session share.
pub(super) fn with_workspace<W: Default, R>(workspace: &Mutex<W>, f: impl FnOnce(&mut W) -> R) -> R {
    match workspace.try_lock() {
        Ok(mut shared) => f(&mut shared),
        Err(TryLockError::Poisoned(poisoned)) => f(&mut poisoned.into_inner()),
        // Another session of this domain is computing; rather than wait for it, allocate.
        Err(TryLockError::WouldBlock) => f(&mut W::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Threads;

    #[test]
    fn a_stretch_gives_each_number_once_from_both_ends() {
        let stretch = Stretch::new(3, 7);
        let taken = [stretch.take_first(), stretch.take_last(), stretch.take_first(), stretch.take_last()];
        assert_eq!(taken, [Some(3), Some(6), Some(4), Some(5)]);
        assert_eq!((stretch.take_first(), stretch.take_last()), (None, None));
    }

    #[test]
    fn threads_share_a_stretch_out() {
        let (stretch, sum) = (Stretch::new(0, 10_000), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                while let Some(i) = stretch.take_first() {
                    sum.fetch_add(i + 1, Ordering::Relaxed);
                }
            });
            while let Some(i) = stretch.take_last() {
                sum.fetch_add(i + 1, Ordering::Relaxed);
            }
            // By hand, as in `Threads`.
            other.join().unwrap();
        });
        assert_eq!(sum.into_inner(), 10_000 * 10_001 / 2);
    }

    #[test]
    fn a_phase_is_over_when_all_of_it_is_done_whoever_did_it() {
        for num_threads in 1..=4 {
            let (guard, phase, sum) = (Guard::default(), Phase::default(), AtomicUsize::new(0));
            let work = |_: usize| {
                phase.run(100, &guard, |i| _ = sum.fetch_add(i, Ordering::Relaxed));
                assert_eq!(sum.load(Ordering::Relaxed), 99 * 100 / 2, "{num_threads} threads");
            };
            // More calls than threads: the last ones find nothing left to do.
            Threads(num_threads).run(5, &work).unwrap();
            assert_eq!(guard.finish(), Ok(()));
        }
    }

    #[test]
    fn what_panics_is_waited_for_by_nobody_and_reported() {
        for num_threads in [1, 3] {
            let (guard, phase, num_done) = (Guard::default(), Phase::default(), AtomicUsize::new(0));
            let part = |i: usize| {
                assert_ne!(i, 3, "meant to fail");
                num_done.fetch_add(1, Ordering::Relaxed);
            };
            Threads(num_threads).run(num_threads, &|_| phase.run(8, &guard, part)).unwrap();
            assert_eq!(num_done.into_inner(), 7);
            assert_eq!(guard.finish(), Err("a task panicked".into()));
        }
    }
}
