//! Owns this crate's clock: the only place that reads the time.
//!
//! Invariant: it is monotonic, so a difference of two readings is never negative.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Reads the monotonic clock.
#[allow(clippy::disallowed_methods, reason = "a client measures latency; this function is its one clock")]
pub fn now() -> Instant {
    Instant::now()
}

/// A seed that differs from run to run, so that a repeated bench does not meet its own prefix cache.
pub fn fresh_seed() -> u64 {
    // Whole milliseconds stay short enough to be typed back in with `--seed`.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
