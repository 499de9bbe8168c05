//! Owns the limits of the HTTP side that the options make.

use std::time::Duration;

use super::ServeArgs;
use super::values::MIB;
use crate::state::HttpOptions;
use crate::stream::event_log::LogLimits;
use crate::stream::memory_store::StoreLimits;

/// Bodies of the largest size that may be read at once.
const NUM_LARGEST_BODIES: usize = 32;

impl ServeArgs {
    /// The limits of the HTTP side; no reply has more than `max_model_len` tokens.
    pub fn http_options(&self, max_model_len: usize) -> HttpOptions {
        HttpOptions {
            allowed_origins: self.allowed_origins.clone(),
            max_body_bytes: self.max_body_bytes,
            connection_limits: self.connections.limits(),
            // However small they are, a decoder has room.
            body_memory_bytes: (self.max_body_bytes + MIB).saturating_mul(NUM_LARGEST_BODIES),
            comment_period: Duration::from_secs(self.keep_alive_comment),
            status_hold: Duration::from_millis(self.streams.status_hold),
            write_timeout: Duration::from_secs(self.streams.write_timeout),
            drain_timeout: Duration::from_secs(self.drain_timeout),
            fault_exit_timeout: (self.fault_exit_timeout > 0)
                .then(|| Duration::from_secs(self.fault_exit_timeout)),
            time_limits: self.streams.time_limits(),
            resume_grace: Duration::from_secs(self.streams.resume_grace),
            store_limits: StoreLimits {
                retention: Duration::from_secs(self.streams.resume_retention),
                max_bytes: self.streams.resume_memory.saturating_mul(MIB),
                max_detached: self.streams.max_detached_per_key,
            },
            log_limits: LogLimits {
                // Role, one delta a token, and the flush at the end.
                max_events: max_model_len + 2,
                max_bytes: self.max_reply_bytes,
            },
        }
    }
}
