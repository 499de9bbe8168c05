//! Continuous batching over a paged KV cache, on ONNX Runtime.
//!
//! [`Engine`] is the whole machine without clock and I/O: it plans a step, runs it and applies its outcome.
//! [`EngineThread`] gives it a thread, a clock and channels, and [`EngineHandle`] is how other threads use it.
//! [`model`] reads what the exporter wrote, [`runner`] computes. Text, JSON, HTTP and Prometheus are unknown here.

mod config;
mod cost_model;
mod draft;
mod engine;
mod error;
mod fault;
mod kv_cache;
pub mod model;
mod observer;
mod queue;
mod request;
pub mod runner;
mod sampler;
mod sampling_params;
mod scheduler;
mod sequence;
mod step;
mod thread;

pub use config::{EngineConfig, PrefixCaching};
pub use cost_model::{CostModel, PrefillBudget, StepBounds, StepBudget, StepWork};
pub use engine::Engine;
pub use error::{LoadError, RunError, RunErrorKind, SequenceError, SubmitError};
pub use fault::Fault;
pub use model::Manifest;
pub use observer::{AdmissionReport, EngineGauges, EngineObserver, NoObserver, StepReport};
pub use request::{FinishReason, PRIORITIES, Request, RequestId, TenantId, TimedEvent, TokenEvent};
pub use sampler::Sampler;
pub use sampling_params::{MAX_LOGIT_BIAS, SamplingParams};
pub use scheduler::Scheduler;
pub use sequence::{RunningSequence, Sequence};
pub use step::{Candidates, FetchLogits, Logits, ScheduledSequence, StepOutput, StepPlan};
pub use thread::{
    Clock, EngineHandle, EngineLimits, EngineStatus, EngineThread, EventReceiver, FaultGeneration, Progress,
    Stage, WakeGroup,
};
