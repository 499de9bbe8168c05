//! Owns what the engine thread publishes between steps: what runs, who waits, and what each may expect.
//!
//! Invariant: nothing here waits. What is published may be a little old; it is for estimates only.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Worker;
use crate::config::EngineConfig;
use crate::cost_model::{Capacity, LengthCurve, QueueForecast, RequestWork, StepWork};
use crate::runner::ModelRunner;
use crate::sequence::{RunningSequence, Sequence};
use crate::thread::published::progress::Stage;
use crate::thread::published::waiting_table::Waiting;
use crate::thread::submission::waiting_work;

/// How long the published queue may stand although nothing moved in it: estimates change.
const QUEUE_PERIOD: Duration = Duration::from_millis(100);
/// Up to here the queue is published whenever it changes; a longer one takes too long for that.
const SHORT_QUEUE: usize = 64;
/// The fraction of the golden ratio: its multiples spread evenly, however many there are.
const GOLDEN: f64 = 0.618_033_988_75;

impl<R: ModelRunner> Worker<R> {
    pub(super) fn publish_stall_limit(&self) {
        let EngineConfig { stall_factor, stall_min, .. } = self.config;
        let limit = match self.engine.costs().predict_step(&StepWork::of(self.engine.step_plan())) {
            Some(predicted) => predicted.saturating_mul(stall_factor).max(stall_min),
            None => stall_min.saturating_mul(stall_factor),
        };
        let nanos = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        self.published.stall_limit_ns.store(nanos, Ordering::Relaxed);
    }

    /// A reply has ended.
    pub(super) fn publish_lengths(&mut self) {
        let hazards = self.lengths.hazards();
        self.curve = LengthCurve::new(&hazards);
        self.published.costs.publish_lengths(&hazards);
    }

    /// Publishes what runs and, if anything moved or some time has passed, the queue.
    pub(super) fn publish(&mut self, now: Duration) {
        let is_due = now.saturating_sub(self.queue_published_at) >= QUEUE_PERIOD;
        let scheduler = self.engine.scheduler();
        let queue_version = std::mem::replace(&mut self.queue_version, scheduler.queue_version());
        let has_changed =
            queue_version != self.queue_version || scheduler.running().len() != self.running_work.len();
        self.publish_stages(now);
        // Prompts shrink fast.
        let has_prefill = self.running_work.iter().any(|work| work.num_prefill_tokens > 0);
        if is_due || has_changed || has_prefill {
            self.publish_running();
        }
        if is_due || (has_changed && self.engine.scheduler().num_waiting() <= SHORT_QUEUE) {
            self.queue_published_at = now;
            self.publish_waiting(now);
        }
    }

    /// Tells those that run how far they are.
    fn publish_stages(&self, now: Duration) {
        let mut queue = None;
        for running in self.engine.scheduler().running() {
            let Some(client) = self.clients.get(&running.sequence.id) else { continue };
            client.permit.entry().into_iter().for_each(|entry| self.published.table.set_running(entry));
            if is_decoding(running) {
                client.state.publish(Stage::Decode, None);
                continue;
            }
            let RunningSequence { num_computed_tokens, sequence, .. } = running;
            let (num_computed_tokens, num_tokens) = (*num_computed_tokens, sequence.tokens().len());
            let stage = Stage::Prefill { num_computed_tokens, num_tokens };
            let queue = queue.get_or_insert_with(|| self.queue_forecast(self.decodes()));
            let prefilled = queue.as_mut().map(|queue| queue.run(&self.work(running)));
            client.state.publish(stage, prefilled.map(|time| now.saturating_add(time)));
        }
    }

    fn decodes(&self) -> impl Iterator<Item = RequestWork> {
        self.engine
            .scheduler()
            .running()
            .iter()
            .filter(|running| is_decoding(running))
            .map(|running| self.work(running))
    }

    fn work(&self, running: &RunningSequence) -> RequestWork {
        let RunningSequence { num_computed_tokens, sequence, .. } = running;
        let num_output_tokens = sequence.output().len();
        RequestWork {
            num_cached_tokens: *num_computed_tokens,
            num_held_tokens: *num_computed_tokens,
            num_prefill_tokens: if is_decoding(running) { 0 } else { running.num_pending_tokens() },
            num_output_tokens: self.curve.expected(num_output_tokens, num_due(sequence), num_left(sequence)),
        }
    }

    /// Publishes how much what runs has to do yet. If its replies may be of any length, they won't all end
    /// after the mean of it: their ends are spread as those of so many replies are, with that mean.
    pub(super) fn publish_running(&mut self) {
        let mut works = std::mem::take(&mut self.running_work);
        works.clear();
        let running = || self.engine.scheduler().running().iter().enumerate();
        works.extend(running().map(|(_, running)| self.work(running)));
        let quantile = |(index, running): (usize, &RunningSequence)| {
            let left = ((index as f64 + 0.5) * GOLDEN).fract();
            let sequence = &running.sequence;
            self.curve.quantile(sequence.output().len(), num_due(sequence), num_left(sequence), left)
        };
        let spread: f64 = running().map(quantile).sum();
        let expected: f64 = works.iter().map(|work| work.num_output_tokens).sum();
        let scale = if spread > 0.0 { expected / spread } else { 1.0 };
        for (work, running) in works.iter_mut().zip(running()) {
            work.num_output_tokens = quantile(running) * scale;
        }
        self.running_work = works;
        let Capacity { num_free_blocks, .. } = self.capacity();
        self.published.running.publish(self.running_work.iter().copied(), num_free_blocks);
    }

    fn capacity(&self) -> Capacity {
        let gauges = self.engine.scheduler().gauges();
        let watermark = gauges.num_blocks * self.config.watermark_permille / 1000;
        let num_free_blocks = (gauges.num_blocks - gauges.num_used_blocks).saturating_sub(watermark);
        Capacity { max_num_seqs: self.config.max_num_seqs, num_free_blocks }
    }

    fn queue_forecast(&self, running: impl IntoIterator<Item = RequestWork>) -> Option<QueueForecast<'_>> {
        QueueForecast::new(self.engine.costs(), &self.published.bounds, self.capacity(), running)
    }

    fn publish_waiting(&self, now: Duration) {
        self.published.table.publish_services(|tenant| self.engine.scheduler().service(tenant));
        let mut queue = self.queue_forecast(self.running_work.iter().copied());
        for (position, sequence) in self.engine.scheduler().waiting().into_iter().enumerate() {
            let Some(client) = self.clients.get(&sequence.id) else { continue };
            let waiting = self.waiting(sequence, client.num_cached_tokens);
            let forecast = queue.as_mut().map(|queue| queue.admit(&waiting_work(&waiting, &self.curve)));
            // Until a reply has ended, their lengths are bounds.
            let has_lengths = self.published.costs.has_lengths();
            let forecast = forecast.filter(|forecast| has_lengths || !forecast.needs_end);
            let first_token_at = forecast.map(|forecast| now.saturating_add(forecast.first_token));
            client.state.publish(Stage::Waiting { position }, first_token_at);
            // One that yields to those that are read is ahead of none of them.
            if let Some(entry) = client.permit.entry()
                && sequence.admission.is_some()
                && !sequence.is_yielding
            {
                self.published.table.set_preempted(entry, &waiting);
            }
        }
    }

    fn waiting(&self, sequence: &Sequence, num_cached_tokens: usize) -> Waiting {
        Waiting {
            tenant: sequence.tenant,
            priority: sequence.priority,
            deadline: sequence.deadline,
            num_cached_tokens,
            num_prefill_tokens: sequence.tokens().len() - num_cached_tokens,
            min_tokens: sequence.sampling.fewest_tokens(),
            max_tokens: sequence.sampling.max_tokens,
            num_output_tokens: sequence.output().len(),
        }
    }
}

/// Whether a sequence lacks a token only.
fn is_decoding(running: &RunningSequence) -> bool {
    running.num_pending_tokens() == 1 && !running.sequence.output().is_empty()
}

/// Tokens that a sequence must generate yet.
fn num_due(sequence: &Sequence) -> usize {
    sequence.sampling.fewest_tokens().saturating_sub(sequence.output().len())
}

/// Tokens that a sequence may generate yet.
fn num_left(sequence: &Sequence) -> usize {
    sequence.sampling.max_tokens.saturating_sub(sequence.output().len())
}
