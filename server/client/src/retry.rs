//! Owns when a failed request is tried again, and how long that waits.
//!
//! Invariant: it is a function of what it is told (the error, the time, a random fraction), and between two
//! events that came the number of tries and the time they take are bounded. It never waits less than the
//! server asked for.

use std::time::{Duration, Instant};

use crate::error::ClientError;

/// How hard a client tries.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    /// Tries after a failure before it is final; an event that comes starts the count again.
    pub max_tries: u32,
    /// The longest time from a failure to the last try after it.
    pub max_elapsed: Duration,
    /// The longest wait before the second try; each later one may be twice as long. The first is at once
    /// after a break, and like the second after a refusal.
    pub base_backoff: Duration,
    /// The longest wait of all, unless the server asks for more.
    pub max_backoff: Duration,
    /// The longest `Retry-After` that is waited for; a longer one makes the refusal final.
    pub max_retry_after: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_tries: 10,
            max_elapsed: Duration::from_secs(180),
            base_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(5),
            max_retry_after: Duration::from_secs(60),
        }
    }
}

/// The tries since the last event that came.
#[derive(Debug)]
pub(crate) struct Backoff {
    policy: RetryPolicy,
    tries: u32,
    failing_since: Option<Instant>,
}

impl Backoff {
    pub(crate) fn new(policy: RetryPolicy) -> Self {
        Self { policy, tries: 0, failing_since: None }
    }

    /// An event came: what failed before it is forgotten.
    pub(crate) fn progress(&mut self) {
        self.tries = 0;
        self.failing_since = None;
    }

    /// How long to wait after `error` before the next try, `fraction` of the way through the jitter; the
    /// error itself if there is to be none.
    pub(crate) fn wait_after(
        &mut self,
        error: ClientError,
        now: Instant,
        fraction: f64,
    ) -> Result<Duration, ClientError> {
        if !is_retryable(&error) {
            return Err(error);
        }
        let failing_since = *self.failing_since.get_or_insert(now);
        let doublings = self.tries.min(16);
        let longest = (self.policy.base_backoff * (1 << doublings)).min(self.policy.max_backoff);
        let mut wait = longest.mul_f64(fraction);
        if let Some(retry_after) = retry_after(&error) {
            if retry_after > self.policy.max_retry_after {
                return Err(error);
            }
            wait += retry_after;
        } else if self.tries == 0 && !matches!(error, ClientError::Status { .. }) {
            // One lost connection is no sign of an overloaded server.
            wait = Duration::ZERO;
        }
        if self.tries == self.policy.max_tries
            || (now + wait).duration_since(failing_since) > self.policy.max_elapsed
        {
            return Err(ClientError::GaveUp { tries: self.tries, last: Box::new(error) });
        }
        self.tries += 1;
        Ok(wait)
    }
}

fn retry_after(error: &ClientError) -> Option<Duration> {
    match error {
        ClientError::Status { retry_after_s, .. } => retry_after_s.map(Duration::from_secs),
        _ => None,
    }
}

/// Whether the same request may succeed later.
fn is_retryable(error: &ClientError) -> bool {
    match error {
        ClientError::Transport(error) => !error.is_builder() && !error.is_redirect(),
        ClientError::Idle(_) | ClientError::Truncated { .. } => true,
        // A conflict that passes says when; one that lasts, such as another model's digest, does not.
        ClientError::Status { status: 409, retry_after_s, .. } => retry_after_s.is_some(),
        ClientError::Status { status, .. } => {
            matches!(status, 408 | 429 | 500..=599) && !matches!(status, 501 | 505)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    fn status(status: u16, retry_after_s: Option<u64>) -> ClientError {
        ClientError::Status { status, error: None, retry_after_s, body: String::new() }
    }

    fn broken() -> ClientError {
        ClientError::Truncated { broken: None }
    }

    #[test]
    fn refusals_that_pass_are_tried_again_and_others_are_final() {
        let try_again = |error: ClientError| {
            Backoff::new(RetryPolicy::default()).wait_after(error, clock::now(), 0.5).is_ok()
        };
        for code in [408, 429, 500, 502, 503, 504, 529] {
            assert!(try_again(status(code, None)), "{code}");
        }
        for code in [400, 401, 403, 404, 409, 410, 413, 422, 501, 505] {
            assert!(!try_again(status(code, None)), "{code}");
        }
        assert!(try_again(status(409, Some(1))));
        assert!(try_again(broken()) && try_again(ClientError::Idle(Duration::ZERO)));
        assert!(!try_again(ClientError::NotAStream(String::new())));
    }

    #[test]
    fn waits_grow_with_jitter_and_end_by_count() {
        let policy = RetryPolicy { max_tries: 4, ..RetryPolicy::default() };
        let mut backoff = Backoff::new(policy);
        let now = clock::now();
        let mut waits = Vec::new();
        let last = loop {
            match backoff.wait_after(broken(), now, 0.5) {
                Ok(wait) => waits.push(wait.as_millis()),
                Err(error) => break error,
            }
        };
        assert_eq!(waits, [0, 100, 200, 400]);
        assert!(matches!(last, ClientError::GaveUp { tries: 4, .. }), "{last}");
        backoff.progress();
        assert_eq!(backoff.wait_after(status(503, None), now, 0.5).expect("counted anew").as_millis(), 50);
    }

    #[test]
    fn the_server_is_never_asked_before_it_said_and_not_for_ever() {
        let mut backoff = Backoff::new(RetryPolicy::default());
        let now = clock::now();
        assert_eq!(
            backoff.wait_after(status(429, Some(7)), now, 0.0).expect("bearable"),
            Duration::from_secs(7)
        );
        let wait = backoff.wait_after(status(429, Some(7)), now, 0.99).expect("bearable");
        assert!(wait > Duration::from_secs(7) && wait < Duration::from_secs(8), "{wait:?}");
        let refused = backoff.wait_after(status(429, Some(61)), now, 0.0);
        assert!(matches!(refused, Err(ClientError::Status { status: 429, .. })), "{refused:?}");
        let late = now + Duration::from_secs(179);
        assert!(matches!(
            backoff.wait_after(status(429, Some(7)), late, 0.0),
            Err(ClientError::GaveUp { .. })
        ));
    }
}
