//! Owns the threads that operators compute with: those that ONNX Runtime's session has anyway.
//!
//! Invariant: no panic reaches ONNX Runtime, which is not Rust.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use ort::operator::ComputeContext;

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

/// Catches panics of tasks on any thread, to report them when all are done.
#[derive(Default)]
pub(super) struct Guard(AtomicBool);

impl Guard {
    /// Calls `f`.
    pub(super) fn call(&self, f: &dyn Fn()) {
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
