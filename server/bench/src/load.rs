//! Owns how requests come: from streams that wait for their answers, or by a clock that waits for nobody.

use std::fmt;

use crate::args::BenchArgs;

/// One in so many arrivals, beside those that count, warms up.
pub(super) const WARM_UP_SHARE: u32 = 8;

/// The load of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Load {
    /// So many streams, each with so many measured requests one after the other.
    Closed { streams: u32, requests_per_stream: u32 },
    /// So many measured requests that arrive at random, `rate` a second.
    Open { rate: f64, arrivals: u32 },
}

impl Load {
    /// The loads that the arguments ask for.
    pub(super) fn of(args: &BenchArgs) -> Vec<Self> {
        if args.rates.is_empty() {
            let requests_per_stream = args.requests_per_stream;
            args.streams.iter().map(|&streams| Self::Closed { streams, requests_per_stream }).collect()
        } else {
            args.rates.iter().map(|&rate| Self::Open { rate, arrivals: args.arrivals }).collect()
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { streams, .. } => write!(f, "{streams} streams"),
            Self::Open { rate, .. } => write!(f, "{rate} requests/s"),
        }
    }
}
