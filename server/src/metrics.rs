//! Owns every metric's name.
//!
//! Invariants: names live here and nowhere else; each server has a registry of its own; the label
//! values that alerts watch are there from the start, at 0, so that a rate sees the first event.

mod gpu;
mod register;
mod stream_record;

use glm_engine::{AdmissionReport, EngineGauges, EngineObserver, Manifest, StepReport};
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

pub(crate) use self::gpu::{GpuMetrics, GpuSample};
use self::register::add;
pub use self::stream_record::{Arrival, Delivery, StreamRecord};
use crate::error::LOAD_CODES;

/// OpenTelemetry's buckets for the time to first token, and on to overload.
const FIRST_TOKEN_BUCKETS: [f64; 20] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0,
];
/// OpenTelemetry's buckets for the time per output token, finer below and on to stalls.
const INTER_TOKEN_BUCKETS: [f64; 19] = [
    0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0,
    40.0,
];
/// OpenTelemetry's buckets for a request's duration, doubled twice more.
const DURATION_BUCKETS: [f64; 16] =
    [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68];
const STEP_BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

/// How an accepted request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A stop id or a stop string.
    Stop,
    /// `max_tokens` were generated.
    Length,
    /// The client left, or said so.
    Abort,
    /// A time limit passed.
    Timeout,
    /// The server failed.
    Error,
}

impl Outcome {
    const ALL: [Self; 5] = [Self::Stop, Self::Length, Self::Abort, Self::Timeout, Self::Error];

    /// The label's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Timeout => "timeout",
            Self::Error => "error",
        }
    }
}

/// All metrics of one server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests_running: IntGauge,
    requests_waiting: IntGauge,
    kv_cache_usage: Gauge,
    steps: IntCounter,
    failed_steps: IntCounter,
    step_duration: Histogram,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    draft_tokens: IntCounter,
    accepted_draft_tokens: IntCounter,
    preemptions: IntCounter,
    prefix_cache_queries: IntCounter,
    prefix_cache_hits: IntCounter,
    first_token: Histogram,
    inter_token: Histogram,
    queue_time: Histogram,
    duration: Histogram,
    streams: IntCounterVec,
    empty_streams: IntCounter,
    refused: IntCounterVec,
    delivered_first_token: Histogram,
    delivery_lag: Histogram,
    slow_readers_cut: IntCounter,
    streams_resumed: IntCounter,
    streams_detached: IntGauge,
    stream_store_bytes: IntGauge,
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Errors
    /// A name is registered twice or is not a name: a mistake in this file.
    pub fn new(manifest: &Manifest) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let r = &registry;
        let build_labels = ["version", "model", "model_digest"];
        let build_info =
            IntGaugeVec::new(Opts::new("glmserve_build_info", "Build and model; always 1."), &build_labels)?;
        build_info
            .with_label_values(&[env!("CARGO_PKG_VERSION"), &manifest.model.name, &manifest.digest])
            .set(1);
        add(r, build_info)?;
        r.register(Box::new(ProcessCollector::for_self()))?;
        let streams = Opts::new("glmserve_streams_total", "Accepted requests that ended, by outcome.");
        let streams = add(r, IntCounterVec::new(streams, &["outcome"])?)?;
        for outcome in Outcome::ALL {
            streams.with_label_values(&[outcome.name()]);
        }
        let refused = Opts::new(
            "glmserve_http_requests_refused_total",
            "Requests answered with an error, by its code.",
        );
        let refused = add(r, IntCounterVec::new(refused, &["code"])?)?;
        for code in LOAD_CODES {
            refused.with_label_values(&[code]);
        }
        Ok(Self {
            requests_running: add(
                r,
                IntGauge::new("glmserve_requests_running", "Sequences that own KV blocks.")?,
            )?,
            requests_waiting: add(r, IntGauge::new("glmserve_requests_waiting", "Sequences in the queue.")?)?,
            kv_cache_usage: add(
                r,
                Gauge::new("glmserve_kv_cache_usage_ratio", "KV blocks in use, from 0 to 1.")?,
            )?,
            steps: counter(
                r,
                "glmserve_engine_steps_total",
                "Steps of the engine, those for its known answer included.",
            )?,
            failed_steps: counter(
                r,
                "glmserve_engine_failed_steps_total",
                "Steps on which the runner failed.",
            )?,
            step_duration: histogram(
                r,
                "glmserve_step_duration_seconds",
                "Time of one step that computed for users.",
                &STEP_BUCKETS,
            )?,
            prompt_tokens: counter(r, "glmserve_prompt_tokens_total", "Tokens of users' prompts computed.")?,
            generation_tokens: counter(r, "glmserve_generation_tokens_total", "Tokens sampled for users.")?,
            draft_tokens: counter(
                r,
                "glmserve_draft_tokens_total",
                "Draft tokens taken from a sequence's own text and computed in advance.",
            )?,
            accepted_draft_tokens: counter(
                r,
                "glmserve_accepted_draft_tokens_total",
                "Draft tokens that were accepted: tokens without a step of their own.",
            )?,
            preemptions: counter(r, "glmserve_preemptions_total", "Sequences preempted.")?,
            prefix_cache_queries: counter(
                r,
                "glmserve_prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache.",
            )?,
            prefix_cache_hits: counter(
                r,
                "glmserve_prefix_cache_hits_total",
                "Prompt tokens found in the prefix cache, which are not computed.",
            )?,
            first_token: histogram(
                r,
                "glmserve_time_to_first_token_seconds",
                "From the arrival of a request's whole body to the end of the step that generated its first token.",
                &FIRST_TOKEN_BUCKETS,
            )?,
            inter_token: histogram(
                r,
                "glmserve_inter_token_latency_seconds",
                "Engine time between two steps that generated for a request, divided by the tokens that the second one \
                 generated for it; counted once for each of these.",
                &INTER_TOKEN_BUCKETS,
            )?,
            queue_time: histogram(
                r,
                "glmserve_request_queue_seconds",
                "From the submission of a user's request to its first admission.",
                &FIRST_TOKEN_BUCKETS,
            )?,
            duration: histogram(
                r,
                "glmserve_request_duration_seconds",
                "From the arrival of an accepted request's whole body to the end of its reply, not of its delivery.",
                &DURATION_BUCKETS,
            )?,
            streams,
            empty_streams: counter(
                r,
                "glmserve_empty_streams_total",
                "Replies that ended well without any text.",
            )?,
            refused,
            delivered_first_token: histogram(
                r,
                "glmserve_delivered_time_to_first_token_seconds",
                "From the arrival of a request's whole body until its connection took the first text; streams only.",
                &FIRST_TOKEN_BUCKETS,
            )?,
            delivery_lag: histogram(
                r,
                "glmserve_delivery_lag_seconds",
                "From the time when a text was ready until its connection took it; streams only.",
                &INTER_TOKEN_BUCKETS,
            )?,
            slow_readers_cut: counter(
                r,
                "glmserve_slow_readers_cut_total",
                "Connections cut because their client took no bytes.",
            )?,
            streams_resumed: counter(
                r,
                "glmserve_streams_resumed_total",
                "Readers that came to a stream that was there already.",
            )?,
            streams_detached: add(
                r,
                IntGauge::new("glmserve_streams_detached", "Running streams without a reader.")?,
            )?,
            stream_store_bytes: add(
                r,
                IntGauge::new("glmserve_stream_store_bytes", "Bytes of finished streams kept for resume.")?,
            )?,
            registry,
        })
    }

    /// The exposition in Prometheus' text format.
    ///
    /// # Errors
    /// The encoder refuses what was gathered.
    pub fn encode(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Registers the metrics of a GPU.
    ///
    /// # Errors
    /// They are registered already.
    pub(crate) fn gpu(&self, uuid: &str, name: &str) -> prometheus::Result<GpuMetrics> {
        GpuMetrics::register(&self.registry, uuid, name)
    }

    /// Counts a request that was answered with an error.
    pub fn refused(&self, code: &str) {
        self.refused.with_label_values(&[code]).inc();
    }

    /// Counts a connection that was cut because its client took no bytes.
    pub fn slow_reader_cut(&self) {
        self.slow_readers_cut.inc();
    }

    /// Counts a reader that came to a stream that was there already.
    pub fn stream_resumed(&self) {
        self.streams_resumed.inc();
    }

    /// What the store of streams holds.
    pub fn stream_store(&self, num_detached: usize, num_bytes: usize) {
        self.streams_detached.set(num_detached as i64);
        self.stream_store_bytes.set(num_bytes as i64);
    }
}

fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    add(registry, IntCounter::new(name, help)?)
}

fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
    add(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?)
}

impl EngineObserver for Metrics {
    fn step(&self, report: &StepReport) {
        self.steps.inc();
        self.failed_steps.inc_by(u64::from(report.failed));
        if report.serves_users {
            self.step_duration.observe(report.duration.as_secs_f64());
        }
        self.prompt_tokens.inc_by(report.num_prompt_tokens as u64);
        self.generation_tokens.inc_by(report.num_generated_tokens as u64);
        self.draft_tokens.inc_by(report.num_draft_tokens as u64);
        self.accepted_draft_tokens.inc_by(report.num_accepted_draft_tokens as u64);
        self.preemptions.inc_by(report.num_preemptions as u64);
    }

    fn gauges(&self, gauges: &EngineGauges) {
        self.requests_running.set(gauges.num_running as i64);
        self.requests_waiting.set(gauges.num_waiting as i64);
        self.kv_cache_usage.set(gauges.num_used_blocks as f64 / gauges.num_blocks.max(1) as f64);
    }

    fn admitted(&self, report: &AdmissionReport) {
        self.queue_time.observe(report.queue_time.as_secs_f64());
        self.prefix_cache_queries.inc_by(report.num_queried_tokens as u64);
        self.prefix_cache_hits.inc_by(report.num_cached_tokens as u64);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::fixtures;

    #[test]
    fn outcomes_are_there_at_zero_and_each_request_counts_once() {
        let metrics = Arc::new(Metrics::new(&fixtures::chatglm3().manifest()).unwrap());
        let text = metrics.encode().unwrap();
        for line in [
            "glmserve_streams_total{outcome=\"abort\"} 0",
            "glmserve_http_requests_refused_total{code=\"queue_full\"} 0",
            "glmserve_empty_streams_total 0",
            "model=\"test-model\",model_digest=\"sha256:",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        let mut record = StreamRecord::new(metrics.clone(), Arrival::now());
        let second = Duration::from_secs(1);
        // The second step generated three tokens, the third one token.
        for at in [5, 8, 8, 8, 10] {
            record.token(at * second, Duration::ZERO);
        }
        record.end(Outcome::Stop);
        drop(record);
        drop(StreamRecord::new(metrics.clone(), Arrival::now()));
        let text = metrics.encode().unwrap();
        for line in [
            "glmserve_streams_total{outcome=\"stop\"} 1",
            "glmserve_streams_total{outcome=\"error\"} 1",
            "glmserve_empty_streams_total 1",
            "glmserve_time_to_first_token_seconds_count 1",
            "glmserve_inter_token_latency_seconds_count 4",
            "glmserve_inter_token_latency_seconds_sum 5",
            "glmserve_inter_token_latency_seconds_bucket{le=\"1\"} 3",
            "glmserve_inter_token_latency_seconds_bucket{le=\"2.5\"} 4",
            "glmserve_request_duration_seconds_count 2",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
