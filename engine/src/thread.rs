//! Owns the engine's thread, its clock and its channels; nothing else in this crate touches them.
//!
//! Invariant: the engine never waits for a reader. Each request's channel holds all the events the
//! request can cause, so sending never fails for want of room and no event is lost. Every accepted
//! request gets exactly one terminal event, even if the thread panics.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use tokio::sync::mpsc;

use crate::config::EngineConfig;
use crate::engine::Engine;
use crate::error::{LoadError, SequenceError, SubmitError};
use crate::observer::{EngineGauges, EngineObserver};
use crate::request::{Request, RequestId, TokenEvent};
use crate::runner::ModelRunner;

/// What bounds every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Longest sequence, prompt and output: the smallest of model, configuration and KV cache.
    pub max_model_len: usize,
    /// Ids below this are real tokens.
    pub vocab_size: usize,
    /// Requests that may run and wait together.
    pub max_num_requests: usize,
    /// Bytes of the KV cache.
    pub kv_cache_bytes: usize,
}

/// What the engine is doing, as of its last step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EngineStatus {
    /// Whether requests are taken.
    pub accepting: bool,
    /// Whether the thread is there.
    pub alive: bool,
    /// Steps so far: if work is there and this stands still, the engine hangs.
    pub num_steps: u64,
    /// Requests accepted and not ended.
    pub num_requests: usize,
}

/// State that HTTP workers read while the engine writes it.
#[derive(Debug)]
struct Shared {
    limits: EngineLimits,
    accepting: AtomicBool,
    alive: AtomicBool,
    num_requests: AtomicUsize,
    num_steps: AtomicU64,
}

enum Command {
    Submit(Request, mpsc::Sender<TokenEvent>),
    AbortAll,
}

/// The receiving end of one request. Dropping it aborts the request.
#[derive(Debug)]
pub struct EventReceiver {
    events: mpsc::Receiver<TokenEvent>,
    has_ended: bool,
}

impl EventReceiver {
    /// The next event; `None` after the terminal one. Cancel-safe.
    pub async fn recv(&mut self) -> Option<TokenEvent> {
        if self.has_ended {
            return None;
        }
        let event = self.events.recv().await.unwrap_or(TokenEvent::Failed(SequenceError::EngineDied));
        self.has_ended = event.is_terminal();
        Some(event)
    }
}

/// Submits requests from any thread. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    /// Queues a request; never blocks.
    ///
    /// # Errors
    /// [`SubmitError`] says why nothing was queued.
    pub fn submit(&self, request: Request) -> Result<EventReceiver, SubmitError> {
        let shared = &self.shared;
        check_request(&request, &shared.limits)?;
        if !shared.accepting.load(Ordering::Acquire) {
            return Err(SubmitError::Unavailable("it is shutting down or has failed"));
        }
        let max = shared.limits.max_num_requests;
        let take = |count: usize| (count < max).then_some(count + 1);
        if let Err(num_requests) = shared.num_requests.fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
        {
            return Err(SubmitError::QueueFull { num_requests });
        }
        // One event a token and the terminal one.
        let (sender, events) = mpsc::channel(request.sampling.max_tokens + 1);
        if self.commands.try_send(Command::Submit(request, sender)).is_err() {
            shared.num_requests.fetch_sub(1, Ordering::AcqRel);
            return Err(SubmitError::Unavailable("its thread has ended"));
        }
        Ok(EventReceiver { events, has_ended: false })
    }

    /// The limits.
    pub fn limits(&self) -> EngineLimits {
        self.shared.limits
    }

    /// The latest state.
    pub fn status(&self) -> EngineStatus {
        let shared = &self.shared;
        EngineStatus {
            accepting: shared.accepting.load(Ordering::Acquire),
            alive: shared.alive.load(Ordering::Acquire),
            num_steps: shared.num_steps.load(Ordering::Relaxed),
            num_requests: shared.num_requests.load(Ordering::Acquire),
        }
    }

    /// Takes no more requests; what was accepted goes on.
    pub fn drain(&self) {
        self.shared.accepting.store(false, Ordering::Release);
    }

    /// Takes no more requests and ends the accepted ones with [`SequenceError::ShuttingDown`].
    pub fn abort_all(&self) {
        self.drain();
        // The channel has room for it beside all requests; if the thread is gone, so are they.
        let _ = self.commands.try_send(Command::AbortAll);
    }
}

fn check_request(request: &Request, limits: &EngineLimits) -> Result<(), SubmitError> {
    let invalid = |message: String| SubmitError::InvalidParameter { field: "prompt", message };
    request.sampling.validate(limits.vocab_size)?;
    let prompt = &request.prompt_token_ids;
    if prompt.is_empty() {
        return Err(invalid("has no tokens".into()));
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= limits.vocab_size) {
        return Err(invalid(format!("token id {id} is not below {}", limits.vocab_size)));
    }
    let num_tokens = prompt.len().saturating_add(request.sampling.max_tokens);
    if num_tokens > limits.max_model_len {
        return Err(SubmitError::TooLong { num_tokens, limit: limits.max_model_len });
    }
    Ok(())
}

/// The running thread. It ends when every [`EngineHandle`] is dropped.
#[derive(Debug)]
pub struct EngineThread {
    thread: JoinHandle<()>,
}

impl EngineThread {
    /// Starts the engine. `max_model_len` is cut to what the KV cache holds.
    ///
    /// # Errors
    /// [`LoadError::Config`] if the limits contradict each other, or the thread can't be started.
    pub fn spawn(
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
        if config.max_model_len < 2 {
            return Err(LoadError::Config("the KV cache is too small for a prompt and a token".into()));
        }
        let max_num_requests = config.max_num_seqs + config.max_num_waiting;
        let shared = Arc::new(Shared {
            limits: EngineLimits {
                max_model_len: config.max_model_len,
                vocab_size,
                max_num_requests,
                kv_cache_bytes: cache.num_bytes,
            },
            accepting: AtomicBool::new(true),
            alive: AtomicBool::new(true),
            num_requests: AtomicUsize::new(0),
            num_steps: AtomicU64::new(0),
        });
        let (commands, receiver) = bounded(max_num_requests + 1);
        let mut worker = Worker {
            engine: Engine::new(runner, config, vocab_size),
            commands: receiver,
            senders: HashMap::with_capacity(max_num_requests),
            next_id: 0,
            shared: Arc::clone(&shared),
            observer,
        };
        let body = move || {
            if catch_unwind(AssertUnwindSafe(|| worker.run())).is_err() {
                tracing::error!("the engine thread panicked; no request will be accepted any more");
            }
            worker.close();
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(body);
        let thread =
            thread.map_err(|error| LoadError::Config(format!("cannot start the engine thread: {error}")))?;
        Ok((EngineHandle { commands, shared }, Self { thread }))
    }

    /// Waits until the thread has ended; drop every handle first.
    pub fn join(self) {
        // The thread catches its own panics.
        let _ = self.thread.join();
    }
}

struct Worker<R> {
    engine: Engine<R>,
    commands: Receiver<Command>,
    senders: HashMap<RequestId, mpsc::Sender<TokenEvent>>,
    next_id: u64,
    shared: Arc<Shared>,
    observer: Arc<dyn EngineObserver>,
}

impl<R: ModelRunner> Worker<R> {
    fn run(&mut self) {
        #[allow(clippy::disallowed_methods, reason = "the engine's only clock")]
        let now = Instant::now;
        let epoch = now();
        loop {
            if self.engine.is_idle() {
                self.observer.gauges(&self.engine.gauges());
                match self.commands.recv() {
                    Ok(command) => self.handle(command, epoch.elapsed()),
                    Err(_) => return,
                }
            }
            while let Ok(command) = self.commands.try_recv() {
                self.handle(command, epoch.elapsed());
            }
            self.abort_abandoned();
            if self.engine.is_idle() {
                continue;
            }
            let start = now();
            let mut report = self.engine.step(start - epoch);
            self.deliver();
            report.duration = start.elapsed();
            self.shared.num_steps.fetch_add(1, Ordering::Relaxed);
            self.engine.queue_times().iter().for_each(|&queue_time| self.observer.admitted(queue_time));
            self.observer.step(&report);
            self.observer.gauges(&self.engine.gauges());
        }
    }

    fn handle(&mut self, command: Command, now: std::time::Duration) {
        match command {
            Command::Submit(request, sender) => {
                // Named here, not at the door: ids must grow in the order in which the engine sees them.
                let id = RequestId(self.next_id);
                self.next_id += 1;
                self.senders.insert(id, sender);
                self.engine.add(id, request, now);
            }
            Command::AbortAll => {
                let ids: Vec<RequestId> = self.senders.keys().copied().collect();
                for id in ids {
                    self.engine.abort(id);
                    self.end(id, SequenceError::ShuttingDown);
                }
            }
        }
    }

    /// Aborts the requests whose receiver was dropped.
    fn abort_abandoned(&mut self) {
        let Self { senders, engine, shared, .. } = self;
        senders.retain(|&id, sender| {
            let is_abandoned = sender.is_closed();
            if is_abandoned {
                engine.abort(id);
                shared.num_requests.fetch_sub(1, Ordering::AcqRel);
            }
            !is_abandoned
        });
    }

    /// Hands the step's events to their channels.
    fn deliver(&mut self) {
        for (id, event) in self.engine.events() {
            let Some(sender) = self.senders.get(id) else {
                continue;
            };
            // Fails only if the receiver was dropped: the next step aborts the request.
            let _ = sender.try_send(event.clone());
            if event.is_terminal() {
                self.senders.remove(id);
                self.shared.num_requests.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    fn end(&mut self, id: RequestId, error: SequenceError) {
        if let Some(sender) = self.senders.remove(&id) {
            let _ = sender.try_send(TokenEvent::Failed(error));
            self.shared.num_requests.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Ends whatever is left when the thread ends, for whichever reason.
    fn close(&mut self) {
        self.shared.accepting.store(false, Ordering::Release);
        self.shared.alive.store(false, Ordering::Release);
        let ids: Vec<RequestId> = self.senders.keys().copied().collect();
        ids.into_iter().for_each(|id| self.end(id, SequenceError::EngineDied));
        self.observer.gauges(&EngineGauges::default());
    }
}
