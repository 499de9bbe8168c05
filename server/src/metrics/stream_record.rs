//! Owns the clock that times requests, and what one request tells the metrics.
//!
//! Invariant: generated and delivered latency are two things: the first is the engine's, the second
//! includes the client's own slowness and must never be mistaken for the first.

use std::sync::Arc;

use tokio::time::Instant;

use super::{Metrics, Outcome};

/// When a request arrived.
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
    last_token: Option<Instant>,
    has_text: bool,
    ended: bool,
}

impl StreamRecord {
    /// A request that was accepted.
    pub fn new(metrics: Arc<Metrics>, arrival: Arrival) -> Self {
        Self { metrics, arrival, last_token: None, has_text: false, ended: false }
    }

    /// When it arrived.
    pub fn arrival(&self) -> Instant {
        self.arrival.0
    }

    /// A token came.
    pub fn token(&mut self) {
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => self.metrics.first_token.observe((now - self.arrival.0).as_secs_f64()),
            Some(last) => self.metrics.inter_token.observe((now - last).as_secs_f64()),
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
        let metrics = &self.metrics;
        let is_whole = matches!(outcome, Outcome::Stop | Outcome::Length);
        if is_whole && self.last_token.is_none() {
            // The first token was the stop id, which is no text and an answer all the same.
            metrics.first_token.observe(self.arrival.0.elapsed().as_secs_f64());
        }
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
