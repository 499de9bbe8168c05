//! Owns the count of allocations, for tests and benches: a program that links this crate allocates through it.
//!
//! Invariant: each thread counts its own, so tests that run side by side don't disturb each other.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static NUM_ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

// SAFETY: all work is the system allocator's; counting touches a constant-initialised thread local,
// which allocates nothing. The default `realloc` allocates, and is counted.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        NUM_ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is handed on; `pointer` came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// How often this thread has allocated.
pub fn num_allocations_so_far() -> u64 {
    NUM_ALLOCATIONS.get()
}

/// How often this thread allocated during `f`.
pub fn num_allocations<T>(f: impl FnOnce() -> T) -> u64 {
    let before = num_allocations_so_far();
    let kept = f();
    let after = num_allocations_so_far();
    drop(kept);
    after - before
}

#[test]
fn allocations_are_counted() {
    assert_eq!(num_allocations(|| 1), 0);
    assert_eq!(num_allocations(|| vec![Box::new(1)]), 2);
}
