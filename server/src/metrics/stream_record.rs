//! Owns the clock that times requests, and what one request tells the metrics.
//!
//! Invariant: generated and delivered latency are two things: the first is the engine's and takes the engine's time
//! of each step, so a busy HTTP worker does not show in it; the second includes the client's own slowness and must
//! never be mistaken for the first.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Metrics, Outcome};

/// When a request arrived: its whole body was there. How long a client takes to send it says nothing about the
/// server.
#[derive(Debug, Clone, Copy)]
pub struct Arrival(Instant);

impl Arrival {
    /// Reads the clock.
    pub fn now() -> Self {
        Self(Instant::now())
    }
}

/// The metrics' view of one accepted request; it counts the request once, whatever becomes of it.
#[derive(Debug)]
pub struct StreamRecord {
    metrics: Arc<Metrics>,
    arrival: Arrival,
    last_step: Option<StepTokens>,
    has_text: bool,
    ended: bool,
}

/// What one step of the engine generated for a request.
#[derive(Debug)]
struct StepTokens {
    /// Engine time.
    at: Duration,
    num_tokens: u32,
    /// Since the step before it that generated for the request.
    gap: Option<Duration>,
}

impl StreamRecord {
    /// A request that was accepted.
    pub fn new(metrics: Arc<Metrics>, arrival: Arrival) -> Self {
        Self { metrics, arrival, last_step: None, has_text: false, ended: false }
    }

    /// When it arrived.
    pub fn arrival(&self) -> Instant {
        self.arrival.0
    }

    /// The engine generated a token at the engine time `at`, which was `age` ago.
    pub fn token(&mut self, at: Duration, age: Duration) {
        let gap = match &mut self.last_step {
            Some(step) if step.at == at => {
                step.num_tokens += 1;
                return;
            }
            Some(step) => Some(at.saturating_sub(step.at)),
            None => {
                let time = self.arrival.0.elapsed().saturating_sub(age);
                self.metrics.first_token.observe(time.as_secs_f64());
                None
            }
        };
        self.observe_last_step();
        self.last_step = Some(StepTokens { at, num_tokens: 1, gap });
    }

    /// Each token has an equal share of the time that its step took.
    fn observe_last_step(&self) {
        if let Some(StepTokens { num_tokens, gap: Some(gap), .. }) = self.last_step {
            let share = gap.as_secs_f64() / f64::from(num_tokens);
            (0..num_tokens).for_each(|_| self.metrics.inter_token.observe(share));
        }
    }

    /// Text for the client came.
    pub fn text(&mut self) {
        self.has_text = true;
    }

    /// The request ended. Only the first call counts.
    pub fn end(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        self.observe_last_step();
        let metrics = &self.metrics;
        let is_whole = matches!(outcome, Outcome::Stop | Outcome::Length);
        metrics.streams.with_label_values(&[outcome.name()]).inc();
        metrics.duration.observe(self.arrival.0.elapsed().as_secs_f64());
        if is_whole && !self.has_text {
            metrics.empty_streams.inc();
        }
    }
}

impl Drop for StreamRecord {
    /// A pump that was torn down has failed its request.
    fn drop(&mut self) {
        self.end(Outcome::Error);
    }
}

/// The metrics' view of one streamed answer.
#[derive(Debug)]
pub struct Delivery {
    metrics: Arc<Metrics>,
    arrival: Arrival,
    has_text: bool,
}

impl Delivery {
    /// An answer to a request that arrived then.
    pub fn new(metrics: Arc<Metrics>, arrival: Arrival) -> Self {
        Self { metrics, arrival, has_text: false }
    }

    /// The connection takes a text that was generated at `generated`.
    pub fn delivered(&mut self, generated: Instant) {
        let now = Instant::now();
        self.metrics.delivery_lag.observe((now - generated).as_secs_f64());
        if !std::mem::replace(&mut self.has_text, true) {
            self.metrics.delivered_first_token.observe((now - self.arrival.0).as_secs_f64());
        }
    }
}
