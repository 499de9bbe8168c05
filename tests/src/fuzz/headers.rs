//! Owns the fuzzing of the headers with a syntax of their own: `Last-Event-ID`, `GLM-Timeout`, `Origin`.
//!
//! Claims: an id that is read is the one that was written; a time limit is within what the server takes; an
//! origin that is read is equal to itself and to nothing that a longer host name makes.

use std::time::Duration;

use glmserve::origin::Origin;
use glmserve::stream::cursor::EventId;
use glmserve::stream::time_limits::{Limit, TimeLimits};

const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Each line is tried as each of them.
pub(super) fn run(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    for line in text.split('\n').take(64) {
        if let Ok(id) = line.parse::<EventId>() {
            assert_eq!(id.to_string(), line);
        }
        if let Ok(limits) = TimeLimits::parse(line) {
            let within = |limit: Duration| (Duration::from_millis(1)..=YEAR).contains(&limit);
            assert!(Limit::ALL.into_iter().filter_map(|limit| limits.get(limit)).all(within), "{line:?}");
        }
        if let Ok(origin) = line.parse::<Origin>() {
            assert_eq!(line.parse(), Ok(origin.clone()));
            let is_web = matches!(origin, Origin::Web { .. });
            let longer = format!("{line}.example").parse::<Origin>();
            assert!(!is_web || longer.as_ref() != Ok(&origin), "{line:?} is taken for a longer name");
        }
    }
}
