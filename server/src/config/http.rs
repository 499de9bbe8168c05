//! Owns the options of connections and replies.

use std::time::Duration;

use clap::Args;

use super::values::up_to;
use crate::http::ConnectionLimits;
use crate::stream::time_limits::TimeLimits;

/// How many connections there may be.
#[derive(Debug, Args)]
pub struct ConnectionArgs {
    /// Most connections. One more closes the connection that has waited longest for its client; if all are being
    /// served, it gets 503. Each needs two open files, and the limit of those is raised as far as it goes
    #[arg(long, env = "GLMSERVE_MAX_CONNECTIONS", value_name = "N", default_value_t = 8192, value_parser = up_to::<{ 1 << 20 }>)]
    pub max_connections: usize,
    /// Most connections of one IPv4 address or IPv6 /64 network. A proxy is one address: give it as many as
    /// --max-connections [default: three quarters of --max-connections]
    #[arg(long, env = "GLMSERVE_MAX_CONNECTIONS_PER_PEER", value_name = "N", value_parser = up_to::<{ 1 << 20 }>)]
    pub max_connections_per_peer: Option<usize>,
}

/// What replies may take, and what is kept of them.
#[derive(Debug, Args)]
pub struct StreamArgs {
    /// How long headers wait for the first token, so that an early failure has a status, in milliseconds
    #[arg(long, env = "GLMSERVE_STATUS_HOLD", value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(0..=60_000))]
    pub status_hold: u64,
    // A user who has waited in the queue for a minute has left; until then heartbeats tell the position.
    /// Longest wait in the queue, in seconds; 0 is no limit
    #[arg(long, env = "GLMSERVE_QUEUE_TIMEOUT", value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub queue_timeout: u64,
    // A full context on two cores takes minutes; what can't be met is refused at once anyway.
    /// Longest wait for the first token, in seconds; 0 is no limit. What is predicted to miss it is refused
    #[arg(long, env = "GLMSERVE_FIRST_TOKEN_TIMEOUT", value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub first_token_timeout: u64,
    // Above any step, and above what a preempted reply needs to be computed again.
    /// Longest wait between two tokens, in seconds; 0 is no limit
    #[arg(long, env = "GLMSERVE_INTER_TOKEN_TIMEOUT", value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub inter_token_timeout: u64,
    // 8192 tokens at 2 a second: nothing honest takes longer, and nothing holds its blocks for ever.
    /// Longest time of a whole request, in seconds; 0 is no limit
    #[arg(long, env = "GLMSERVE_REQUEST_TIMEOUT", value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub request_timeout: u64,
    /// How long a client may take no bytes before its connection is cut, in seconds
    #[arg(long, env = "GLMSERVE_WRITE_TIMEOUT", value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub write_timeout: u64,
    /// How long a stream with an Idempotency-Key goes on without a reader, in seconds
    #[arg(long, env = "GLMSERVE_RESUME_GRACE", value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub resume_grace: u64,
    /// How long an ended stream can be read again, in seconds
    #[arg(long, env = "GLMSERVE_RESUME_RETENTION", value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub resume_retention: u64,
    /// Memory of ended streams, in MiB; the oldest of the client that holds most go first
    #[arg(long, env = "GLMSERVE_RESUME_MEMORY", value_name = "MIB", default_value_t = 64)]
    pub resume_memory: usize,
    /// Most streams of one API key, or of one address without keys, that run without a reader; the oldest goes
    /// first. As many more may be promised by `Prefer: respond-async`
    #[arg(long, env = "GLMSERVE_MAX_DETACHED_PER_KEY", value_name = "N", default_value_t = 16)]
    pub max_detached_per_key: usize,
}

impl StreamArgs {
    pub(super) fn time_limits(&self) -> TimeLimits {
        let limit = |seconds: u64| (seconds > 0).then(|| Duration::from_secs(seconds));
        TimeLimits {
            queue: limit(self.queue_timeout),
            first_token: limit(self.first_token_timeout),
            inter_token: limit(self.inter_token_timeout),
            total: limit(self.request_timeout),
        }
    }
}

impl ConnectionArgs {
    pub(super) fn limits(&self) -> ConnectionLimits {
        let max_total = self.max_connections;
        // One peer that takes all it may leaves some to others.
        let share = max_total - max_total / 4;
        ConnectionLimits {
            max_total,
            max_per_peer: self.max_connections_per_peer.unwrap_or(share).min(max_total),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_has_three_quarters_of_all_connections_unless_told() {
        let limits = |max_connections, max_connections_per_peer| {
            let limits = ConnectionArgs { max_connections, max_connections_per_peer }.limits();
            (limits.max_total, limits.max_per_peer)
        };
        assert_eq!(limits(8192, None), (8192, 6144));
        assert_eq!(limits(8192, Some(9000)), (8192, 8192));
        assert_eq!(limits(3, None), (3, 3));
        assert_eq!(limits(1, None), (1, 1));
    }
}
