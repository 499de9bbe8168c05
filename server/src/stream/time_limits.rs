//! Owns the time limits of a reply: which there are, how they are written and which comes first.
//!
//! Invariant: a request can shorten what the server allows, never lengthen it. Must not read a clock.

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

/// The shortest that a request may ask for: no reply comes sooner.
const LEAST: Duration = Duration::from_millis(1);
/// The longest: a year, which is beyond any.
const MOST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// One of the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// From arrival to admission.
    Queue,
    /// From arrival to the first token.
    FirstToken,
    /// Between two tokens.
    InterToken,
    /// From arrival to the end.
    Total,
}

impl Limit {
    /// All, in the order of [`TimeLimits`].
    pub const ALL: [Self; 4] = [Self::Queue, Self::FirstToken, Self::InterToken, Self::Total];

    /// Its name in `GLM-Timeout`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::FirstToken => "first-token",
            Self::InterToken => "inter-token",
            Self::Total => "total",
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How far a reply is, as its limits see it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Milestones {
    /// The engine has begun with it.
    pub is_admitted: bool,
    /// When the last token came.
    pub last_token: Option<Instant>,
}

/// The limits of one reply, or of one reader's patience with it; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TimeLimits {
    /// From arrival to admission.
    pub queue: Option<Duration>,
    /// From arrival to the first token.
    pub first_token: Option<Duration>,
    /// Between two tokens.
    pub inter_token: Option<Duration>,
    /// From arrival to the end.
    pub total: Option<Duration>,
}

impl TimeLimits {
    /// The value of one.
    pub fn get(&self, limit: Limit) -> Option<Duration> {
        match limit {
            Limit::Queue => self.queue,
            Limit::FirstToken => self.first_token,
            Limit::InterToken => self.inter_token,
            Limit::Total => self.total,
        }
    }

    fn slot(&mut self, limit: Limit) -> &mut Option<Duration> {
        match limit {
            Limit::Queue => &mut self.queue,
            Limit::FirstToken => &mut self.first_token,
            Limit::InterToken => &mut self.inter_token,
            Limit::Total => &mut self.total,
        }
    }

    /// The first of the limits to pass, and when, for a client that has waited since `arrival`.
    pub fn first_to_pass(&self, arrival: Instant, reply: &Milestones) -> Option<(Instant, Limit, Duration)> {
        let since = |limit| match limit {
            Limit::Queue => (!reply.is_admitted).then_some(arrival),
            Limit::FirstToken => reply.last_token.is_none().then_some(arrival),
            // A token that came before the client asked does not start its wait for the next one.
            Limit::InterToken => reply.last_token.map(|last| last.max(arrival)),
            Limit::Total => Some(arrival),
        };
        let limits = Limit::ALL.into_iter().filter_map(|limit| {
            let duration = self.get(limit)?;
            Some((since(limit)? + duration, limit, duration))
        });
        limits.min_by_key(|(until, ..)| *until)
    }

    /// These limits, where `other` has none that is shorter.
    pub fn shortened_by(mut self, other: &Self) -> Self {
        for limit in Limit::ALL {
            let slot = self.slot(limit);
            *slot = [*slot, other.get(limit)].into_iter().flatten().min();
        }
        self
    }

    /// Reads a header like `queue=5, first-token=10.5`, in seconds.
    ///
    /// # Errors
    /// What is wrong with the header.
    pub fn parse(header: &str) -> Result<Self, String> {
        let mut given = Self::default();
        for part in header.split(',') {
            let (name, value) =
                part.trim().split_once('=').ok_or_else(|| format!("{part:?} is not NAME=SECONDS"))?;
            let limit = Limit::ALL.into_iter().find(|limit| limit.name() == name);
            let limit = limit.ok_or_else(|| {
                format!("{name:?} is not one of {}", Limit::ALL.map(Limit::name).join(", "))
            })?;
            let value = value.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
            let value = value.filter(|value| (LEAST..=MOST).contains(value)).ok_or_else(|| {
                format!(
                    "{name} must be a number of seconds from {} to {}",
                    LEAST.as_secs_f64(),
                    MOST.as_secs()
                )
            })?;
            if given.slot(limit).replace(value).is_some() {
                return Err(format!("{name} is given twice"));
            }
        }
        Ok(given)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_shortens_and_never_lengthens() {
        let second = Duration::from_secs(1);
        let config =
            TimeLimits { queue: Some(5 * second), first_token: Some(5 * second), ..TimeLimits::default() };
        let given = TimeLimits::parse("queue=0.5,first-token=60 , total=2").unwrap();
        let limits = config.shortened_by(&given);
        assert_eq!(
            limits,
            TimeLimits {
                queue: Some(second / 2),
                first_token: Some(5 * second),
                inter_token: None,
                total: Some(2 * second)
            }
        );
        for wrong in ["", "queue", "x=1", "total=1,total=1"] {
            assert!(TimeLimits::parse(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "0", "-1", "NaN", "inf", "1e30", "1e-10", "0.00099"] {
            let error = TimeLimits::parse(&format!("queue=1, total={wrong}")).unwrap_err();
            assert_eq!(error, "total must be a number of seconds from 0.001 to 31536000", "{wrong}");
        }
        assert_eq!(TimeLimits::parse("total=0.001").unwrap().total, Some(LEAST));
    }

    #[tokio::test]
    async fn the_first_limit_to_pass_follows_the_reply() {
        let second = Duration::from_secs(1);
        let arrival = Instant::now();
        let limits = TimeLimits::parse("queue=1,first-token=2,inter-token=3,total=60").unwrap();
        let first = |is_admitted, last_token: Option<Instant>| {
            let reply = Milestones { is_admitted, last_token };
            let (until, limit, duration) = limits.first_to_pass(arrival, &reply).unwrap();
            assert_eq!(Some(duration), limits.get(limit));
            (until - arrival, limit)
        };
        assert_eq!(first(false, None), (second, Limit::Queue));
        assert_eq!(first(true, None), (2 * second, Limit::FirstToken));
        assert_eq!(first(true, Some(arrival + 10 * second)), (13 * second, Limit::InterToken));
        assert_eq!(first(true, Some(arrival + 58 * second)), (60 * second, Limit::Total));
        assert_eq!(first(true, Some(arrival - second)), (3 * second, Limit::InterToken));
        assert_eq!(TimeLimits::default().first_to_pass(arrival, &Milestones::default()), None);
    }
}
