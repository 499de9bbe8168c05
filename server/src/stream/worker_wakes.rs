//! Owns how an HTTP worker's pumps are woken by the engine's thread: together.
//!
//! Invariant: a pump waits on the thread whose group wakes it. A pump without a group is woken by itself.

use std::cell::OnceCell;

use glm_engine::WakeGroup;

/// Pumps of one worker that may wait to be woken at a time; those beyond are woken by themselves.
const CAPACITY: usize = 1024;

thread_local! {
    static GROUP: OnceCell<WakeGroup> = const { OnceCell::new() };
}

/// The group of the worker that calls this, in whose runtime it is.
pub(super) fn group() -> WakeGroup {
    GROUP.with(|cell| {
        let start = || {
            let (group, future) = WakeGroup::new(CAPACITY);
            // It ends with the runtime. On a runtime after that one, pumps are woken by themselves.
            tokio::spawn(future);
            group
        };
        cell.get_or_init(start).clone()
    })
}
