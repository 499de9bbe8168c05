//! Owns the edge: submitting, receiving, and reading the engine's state from any thread.
//!
//! Invariant: nothing here waits. What HTTP workers and the engine thread share is atomic, so it can
//! be read while the engine hangs in a step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::sync::mpsc;

use super::Clock;
use super::load::{PublishedCosts, PublishedLoad};
use super::progress::{Progress, RequestState};
use crate::cost_model::StepBounds;
use crate::error::{SequenceError, SubmitError};
use crate::request::{Request, TokenEvent};

/// Least time after which a refused request is asked to come again.
const MIN_RETRY_AFTER: Duration = Duration::from_millis(100);
/// When a refused request is asked to come again, until it is learnt how long requests take.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);
/// How much every refusal by an idle engine takes off the next estimate, per cent.
const PERCENT_PER_IDLE_REFUSAL: f64 = 10.0;

/// What bounds every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Longest sequence, prompt and output: the smallest of model, configuration and KV cache.
    pub max_model_len: usize,
    /// Ids below this are real tokens.
    pub vocab_size: usize,
    /// Requests that may run and wait together, a probe apart.
    pub max_num_requests: usize,
    /// Bytes of the KV cache.
    pub kv_cache_bytes: usize,
}

/// Why the engine should not be trusted until a known answer was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Logits were not numbers.
    NonFiniteLogits,
    /// Steps in a row that failed.
    RepeatedRunErrors {
        /// How many.
        count: u32,
    },
}

/// What the engine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EngineStatus {
    /// Whether requests are taken.
    pub accepting: bool,
    /// Whether the thread is there.
    pub alive: bool,
    /// Steps so far.
    pub num_steps: u64,
    /// Requests accepted and not ended, the probe included.
    pub num_requests: usize,
    /// Time since the last sign of progress (a step's end, or the first work after idling), while
    /// there is work.
    pub stalled_for: Option<Duration>,
    /// `stalled_for` beyond this means that the engine hangs: a multiple of the predicted time of
    /// the current step, and not less than the configuration says.
    pub stall_limit: Duration,
    /// What went wrong since [`EngineHandle::clear_fault`].
    pub fault: Option<Fault>,
}

/// State that HTTP workers read while the engine writes it.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) clock: Clock,
    pub(super) limits: EngineLimits,
    pub(super) bounds: StepBounds,
    pub(super) default_deadline: Duration,
    pub(super) accepting: AtomicBool,
    pub(super) alive: AtomicBool,
    pub(super) num_requests: AtomicUsize,
    pub(super) has_probe: AtomicBool,
    pub(super) num_steps: AtomicU64,
    /// Whether there is work; `progress_at` is valid then.
    pub(super) is_busy: AtomicBool,
    /// Engine time in nanoseconds.
    pub(super) progress_at: AtomicU64,
    pub(super) stall_limit_ns: AtomicU64,
    fault: AtomicU64,
    /// Requests refused for their deadline while nothing was there, since the last step.
    pub(super) num_idle_refusals: AtomicU32,
    pub(super) load: PublishedLoad,
    pub(super) costs: PublishedCosts,
}

const NO_FAULT: u64 = 0;
const NON_FINITE: u64 = 1;
/// Added to the count of repeated errors.
const REPEATED: u64 = 1 << 32;

impl Shared {
    pub(super) fn new(
        clock: Clock,
        limits: EngineLimits,
        bounds: StepBounds,
        default_deadline: Duration,
    ) -> Self {
        Self {
            clock,
            limits,
            bounds,
            default_deadline,
            accepting: AtomicBool::new(true),
            alive: AtomicBool::new(true),
            num_requests: AtomicUsize::new(0),
            has_probe: AtomicBool::new(false),
            num_steps: AtomicU64::new(0),
            is_busy: AtomicBool::new(false),
            progress_at: AtomicU64::new(0),
            stall_limit_ns: AtomicU64::new(0),
            fault: AtomicU64::new(NO_FAULT),
            num_idle_refusals: AtomicU32::new(0),
            load: PublishedLoad::default(),
            costs: PublishedCosts::default(),
        }
    }

    pub(super) fn set_fault(&self, fault: Fault) {
        let encoded = match fault {
            Fault::NonFiniteLogits => NON_FINITE,
            Fault::RepeatedRunErrors { count } => REPEATED + u64::from(count),
        };
        self.fault.store(encoded, Ordering::Release);
    }

    fn fault(&self) -> Option<Fault> {
        match self.fault.load(Ordering::Acquire) {
            NO_FAULT => None,
            NON_FINITE => Some(Fault::NonFiniteLogits),
            encoded => Some(Fault::RepeatedRunErrors { count: (encoded - REPEATED) as u32 }),
        }
    }

    /// Gives a request's place back.
    pub(super) fn release(&self, is_probe: bool) {
        if is_probe {
            self.has_probe.store(false, Ordering::Release);
        } else {
            self.num_requests.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Predicted time to the first token of a request submitted now.
    fn estimate(&self, num_prompt_tokens: usize, deadline: Option<Duration>) -> Option<Duration> {
        let load = self.load.load(deadline.unwrap_or(Duration::MAX).min(self.default_deadline));
        self.costs.model().time_to_first_token(&load, num_prompt_tokens, &self.bounds)
    }

    /// Refuses a request whose deadline can't be met. What is refused teaches nothing, so if nothing
    /// runs, each refusal makes the next one less likely: an estimate that is wrong by far is found
    /// out after a while.
    fn check_deadline(&self, request: &Request) -> Result<(), SubmitError> {
        let Some(deadline) = request.deadline else { return Ok(()) };
        let Some(estimate) = self.estimate(request.prompt_token_ids.len(), Some(deadline)) else {
            return Ok(());
        };
        let is_idle = self.num_requests.load(Ordering::Acquire) == 0;
        let num_refusals = if is_idle { self.num_idle_refusals.load(Ordering::Relaxed) } else { 0 };
        let doubt = (1.0 - PERCENT_PER_IDLE_REFUSAL / 100.0).powf(f64::from(num_refusals));
        if estimate.as_secs_f64() * doubt <= deadline.as_secs_f64() {
            return Ok(());
        }
        if is_idle {
            self.num_idle_refusals.fetch_add(1, Ordering::Relaxed);
        }
        let retry_after = estimate.saturating_sub(deadline).max(MIN_RETRY_AFTER);
        Err(SubmitError::DeadlineUnmeetable { estimate, retry_after })
    }

    fn queue_full(&self, num_requests: usize) -> SubmitError {
        let num_slots = self.load.load(Duration::MAX).num_slots;
        let retry_after = self.costs.model().time_between_ends(num_slots);
        let retry_after = retry_after.map_or(DEFAULT_RETRY_AFTER, |time| time.max(MIN_RETRY_AFTER));
        SubmitError::QueueFull { num_requests, retry_after }
    }
}

/// A request on its way to the engine thread.
pub(super) struct Submission {
    pub(super) request: Request,
    pub(super) arrival: Duration,
    pub(super) is_probe: bool,
    pub(super) events: mpsc::Sender<TokenEvent>,
    pub(super) state: Arc<RequestState>,
}

pub(super) enum Command {
    Submit(Submission),
    AbortAll,
}

/// The receiving end of one request. Dropping it aborts the request.
#[derive(Debug)]
pub struct EventReceiver {
    events: mpsc::Receiver<TokenEvent>,
    state: Arc<RequestState>,
    clock: Clock,
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

    /// Where the request is, as of the last step's start.
    pub fn progress(&self) -> Progress {
        self.state.progress(self.clock.now())
    }

    /// Says whether somebody reads what this receives. From the next step on, a detached request is
    /// preempted before every attached one.
    pub fn set_detached(&self, is_detached: bool) {
        self.state.set_detached(is_detached);
    }
}

/// Submits requests from any thread. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    pub(super) commands: Sender<Command>,
    pub(super) shared: Arc<Shared>,
}

impl EngineHandle {
    /// Queues a request; never blocks.
    ///
    /// # Errors
    /// [`SubmitError`] says why nothing was queued.
    pub fn submit(&self, request: Request) -> Result<EventReceiver, SubmitError> {
        let shared = &self.shared;
        self.check(&request)?;
        shared.check_deadline(&request)?;
        let max = shared.limits.max_num_requests;
        let take = |count: usize| (count < max).then_some(count + 1);
        if let Err(count) = shared.num_requests.fetch_update(Ordering::AcqRel, Ordering::Acquire, take) {
            return Err(shared.queue_full(count));
        }
        self.send(request, false)
    }

    /// Whether a request would find a place now: a look before the work of making one.
    ///
    /// # Errors
    /// What [`Self::submit`] would say.
    pub fn check_room(&self) -> Result<(), SubmitError> {
        self.check_accepting()?;
        match self.shared.num_requests.load(Ordering::Acquire) {
            count if count < self.shared.limits.max_num_requests => Ok(()),
            count => Err(self.shared.queue_full(count)),
        }
    }

    /// Queues a known-answer request before all others, even if the queue is full. It gets blocks in
    /// the next step, at the cost of whoever is preempted first. One at a time.
    ///
    /// # Errors
    /// [`SubmitError`] says why nothing was queued; [`SubmitError::QueueFull`] is another probe.
    pub fn submit_probe(&self, request: Request) -> Result<EventReceiver, SubmitError> {
        self.check(&request)?;
        if self.shared.has_probe.swap(true, Ordering::AcqRel) {
            return Err(self.shared.queue_full(self.status().num_requests));
        }
        self.send(request, true)
    }

    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        check_request(request, &self.shared.limits)?;
        self.check_accepting()
    }

    fn check_accepting(&self) -> Result<(), SubmitError> {
        if self.shared.accepting.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(SubmitError::Unavailable("it is shutting down or has failed"))
    }

    fn send(&self, request: Request, is_probe: bool) -> Result<EventReceiver, SubmitError> {
        let shared = &self.shared;
        let arrival = shared.clock.now();
        let num_tokens = request.prompt_token_ids.len();
        let position = match is_probe {
            true => 0,
            false => {
                let deadline = request.deadline.unwrap_or(Duration::MAX).min(shared.default_deadline);
                shared.load.load(deadline).num_requests_ahead
            }
        };
        let estimate = shared.estimate(num_tokens, request.deadline);
        let state = Arc::new(RequestState::new(position, estimate.map(|time| arrival.saturating_add(time))));
        // Admission, one event a token and the terminal one.
        let (sender, events) = mpsc::channel(request.sampling.max_tokens + 2);
        let submission = Submission { request, arrival, is_probe, events: sender, state: Arc::clone(&state) };
        shared.load.add_unseen(num_tokens);
        if self.commands.try_send(Command::Submit(submission)).is_err() {
            shared.load.sub_unseen(1, num_tokens);
            shared.release(is_probe);
            return Err(SubmitError::Unavailable("its thread has ended"));
        }
        // The thread may have ended between the check at the door and the sending: then nobody takes
        // the request out of the channel any more.
        if !shared.alive.load(Ordering::SeqCst) {
            return Err(SubmitError::Unavailable("its thread has ended"));
        }
        Ok(EventReceiver { events, state, clock: shared.clock, has_ended: false })
    }

    /// Predicted time to the first token of a request without a deadline that is submitted now.
    /// `None` until a prompt was computed and, if all places are taken, until a request has ended.
    pub fn estimate(&self, num_prompt_tokens: usize) -> Option<Duration> {
        self.shared.estimate(num_prompt_tokens, None)
    }

    /// The limits.
    pub fn limits(&self) -> EngineLimits {
        self.shared.limits
    }

    /// The latest state. Never waits for the engine.
    pub fn status(&self) -> EngineStatus {
        let shared = &self.shared;
        let stalled_for = shared.is_busy.load(Ordering::Acquire).then(|| {
            let progress_at = Duration::from_nanos(shared.progress_at.load(Ordering::Acquire));
            shared.clock.now().saturating_sub(progress_at)
        });
        let num_probes = usize::from(shared.has_probe.load(Ordering::Acquire));
        EngineStatus {
            accepting: shared.accepting.load(Ordering::Acquire),
            alive: shared.alive.load(Ordering::Acquire),
            num_steps: shared.num_steps.load(Ordering::Relaxed),
            num_requests: shared.num_requests.load(Ordering::Acquire) + num_probes,
            stalled_for,
            stall_limit: Duration::from_nanos(shared.stall_limit_ns.load(Ordering::Relaxed)),
            fault: shared.fault(),
        }
    }

    /// Forgets the fault; to be called once a known-answer request was answered as known.
    pub fn clear_fault(&self) {
        self.shared.fault.store(NO_FAULT, Ordering::Release);
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
