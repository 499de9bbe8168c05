//! Owns the count of bytes that a test has allocated, and the most that it ever had.
//!
//! Invariant: each thread counts its own, so tests that run side by side don't disturb each other.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static ALLOCATED: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn count(num_bytes: isize) {
    let allocated = ALLOCATED.get() + num_bytes;
    ALLOCATED.set(allocated);
    PEAK.set(PEAK.get().max(allocated));
}

// SAFETY: all work is the system allocator's; counting touches constant-initialised thread locals, which
// allocate nothing. The default `realloc` holds both allocations for a moment, which is the worst case.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller's promise is handed on; `pointer` came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The most bytes that `f` held at once on this thread, besides what was there before.
pub(crate) fn peak_bytes<T>(f: impl FnOnce() -> T) -> usize {
    let before = ALLOCATED.get();
    PEAK.set(before);
    drop(f());
    (PEAK.get() - before).cast_unsigned()
}

#[test]
fn the_peak_is_what_was_held_at_once() {
    assert_eq!(peak_bytes(|| 1), 0);
    assert_eq!(peak_bytes(|| (drop(vec![0u8; 1000]), vec![0u8; 600])), 1000);
    assert_eq!(peak_bytes(|| (vec![0u8; 1000], vec![0u8; 600])), 1600);
}
