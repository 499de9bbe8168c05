//! Owns the engine's thread.
//!
//! Invariant: the engine never waits for a reader. Each request's channel holds all the events the
//! request can cause, so sending never fails for want of room and no event is lost. Every accepted
//! request gets exactly one terminal event, even if the thread panics.

mod clock;
mod command;
mod handle;
mod limits;
mod published;
mod submission;
mod wake_group;
mod worker;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::bounded;

pub use clock::Clock;
pub use handle::{EngineHandle, EngineStatus, EventReceiver};
pub use limits::EngineLimits;
pub use published::fault::FaultGeneration;
pub use published::progress::{Progress, Stage};
pub use wake_group::WakeGroup;

use crate::config::EngineConfig;
use crate::engine::Engine;
use crate::error::LoadError;
use crate::observer::EngineObserver;
use crate::runner::ModelRunner;
use published::Published;
use worker::Worker;

/// The running thread. It ends when every [`EngineHandle`] is dropped, or when the device is lost.
#[derive(Debug)]
pub struct EngineThread {
    thread: JoinHandle<()>,
}

impl EngineThread {
    /// Starts the engine, and waits until the runner has prepared itself on its thread. `max_model_len` is cut to
    /// what the KV cache holds.
    ///
    /// # Errors
    /// [`LoadError::Config`] if the limits contradict each other, or the thread can't be started; what
    /// [`ModelRunner::prepare`] says.
    pub fn spawn(
        runner: impl ModelRunner + 'static,
        config: EngineConfig,
        vocab_size: usize,
        observer: Arc<dyn EngineObserver>,
    ) -> Result<(EngineHandle, Self), LoadError> {
        Self::spawn_by(Clock::start(), runner, config, vocab_size, observer)
    }

    /// As [`Self::spawn`], by a clock of the caller's.
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub fn spawn_by(
        clock: Clock,
        runner: impl ModelRunner + 'static,
        mut config: EngineConfig,
        vocab_size: usize,
        observer: Arc<dyn EngineObserver>,
    ) -> Result<(EngineHandle, Self), LoadError> {
        let cache = runner.kv_cache();
        config.max_model_len = config.max_model_len.min(cache.num_blocks * cache.block_size);
        if config.max_num_seqs == 0 || config.max_num_batched_tokens < config.max_num_seqs {
            let message = "max_num_seqs must be at least 1 and at most max_num_batched_tokens";
            return Err(LoadError::Config(message.into()));
        }
        if config.tenant_weights.is_empty() || config.max_num_requests_per_tenant == 0 {
            return Err(LoadError::Config(
                "tenant_weights must not be empty, and max_num_requests_per_tenant must be at least 1".into(),
            ));
        }
        if config.max_model_len < 2 {
            return Err(LoadError::Config("the KV cache is too small for a prompt and a token".into()));
        }
        let max_num_requests = config.max_num_seqs + config.max_num_waiting;
        let limits = EngineLimits {
            max_model_len: config.max_model_len,
            vocab_size,
            max_num_requests,
            max_num_requests_per_tenant: config.max_num_requests_per_tenant,
            num_tenants: config.tenant_weights.len(),
            kv_cache_bytes: cache.num_bytes,
        };
        let engine = Engine::new(runner, config.clone(), vocab_size);
        let cached_prefixes = Arc::clone(engine.scheduler().cached_prefixes());
        let published = Arc::new(Published::new(
            clock,
            limits,
            *engine.bounds(),
            &config,
            cache.num_blocks,
            cached_prefixes,
        ));
        // All requests, the probe, and the command to abort them.
        let (commands, receiver) = bounded(max_num_requests + 2);
        let mut worker = Worker::new(engine, config, receiver, Arc::clone(&published), observer);
        let (sender, prepared) = bounded(1);
        let body = move || {
            let result = catch_unwind(AssertUnwindSafe(|| worker.engine.prepare()));
            let result = result.unwrap_or_else(|_| Err(LoadError::Runtime("preparing panicked".into())));
            let is_prepared = result.is_ok();
            let is_device_lost = matches!(result, Err(LoadError::DeviceLost(_)));
            // Nobody but the caller below listens, who waits.
            let _ = sender.send(result);
            if is_prepared && catch_unwind(AssertUnwindSafe(|| worker.run())).is_err() {
                tracing::error!("the engine thread panicked; no request will be accepted any more");
            }
            worker.close();
            if is_device_lost || worker.has_lost_device() {
                // To take a session down, ONNX Runtime calls the device once more, which can hang or abort
                // the process. The operating system frees everything when the process ends.
                std::mem::forget(worker.engine);
            }
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(body);
        let thread =
            thread.map_err(|error| LoadError::Config(format!("cannot start the engine thread: {error}")))?;
        let ended = |_| Err(LoadError::Runtime("the engine thread ended while it prepared".into()));
        prepared.recv().unwrap_or_else(ended)?;
        Ok((EngineHandle::new(commands, published), Self { thread }))
    }

    /// Waits until the thread has ended; drop every handle first.
    pub fn join(self) {
        // The thread catches its own panics.
        let _ = self.thread.join();
    }
}
