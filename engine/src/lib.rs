//! Continuous batching over a paged KV cache, on ONNX Runtime.
//!
//! One loop, three verbs: the [`engine::Engine`] schedules a step, runs it and applies its outcome;
//! [`thread::EngineThread`] gives it a thread, a clock and channels. Text, JSON, HTTP and
//! Prometheus are unknown here.

pub mod config;
pub mod cost_model;
pub mod draft;
pub mod engine;
pub mod error;
pub mod fault;
pub mod known_answer;
pub mod kv_cache;
pub mod manifest;
pub mod observer;
pub mod queue;
pub mod request;
pub mod runner;
pub mod sampler;
pub mod sampling_params;
pub mod scheduler;
pub mod sequence;
pub mod step;
pub mod thread;

pub use config::{EngineConfig, PrefixCaching};
pub use engine::Engine;
pub use error::{LoadError, RunError, SequenceError, SubmitError};
pub use fault::Fault;
pub use manifest::Manifest;
pub use observer::{AdmissionReport, EngineGauges, EngineObserver, NoObserver, StepReport};
pub use request::{FinishReason, PRIORITIES, Request, RequestId, TenantId, TimedEvent, TokenEvent};
pub use sampling_params::SamplingParams;
pub use step::{Candidates, FetchLogits, Logits, ScheduledSequence, StepOutput, StepPlan};
pub use thread::{
    Clock, EngineHandle, EngineLimits, EngineStatus, EngineThread, EventReceiver, FaultGeneration, Progress,
    Stage,
};
