//! Owns the engine's clock; nothing else in this crate reads one.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Engine time: since the engine was started.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Duration + Send + Sync>);

impl Clock {
    /// Real time from now on.
    #[allow(clippy::disallowed_methods, reason = "the engine's only clock")]
    pub(super) fn start() -> Self {
        let epoch = Instant::now();
        Self::new(move || epoch.elapsed())
    }

    /// Whatever time `now` says, which never goes back: a test's, which no other process delays.
    pub fn new(now: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    pub(super) fn now(&self) -> Duration {
        (self.0)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Clock").field(&self.now()).finish()
    }
}
