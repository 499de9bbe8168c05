//! Owns the engine's face for other threads: submit a request, receive its events, read the state.
//!
//! Invariant: nothing here waits for the engine, so the state can be read while it hangs in a step.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::sync::mpsc;

use super::clock::Clock;
use super::command::{Command, Submission};
use super::limits::EngineLimits;
use super::published::fault::FaultGeneration;
use super::published::progress::{Progress, RequestState};
use super::published::{Permit, Published};
use super::submission::check_request;
use super::wake_group::WakeGroup;
use crate::error::{SequenceError, SubmitError};
use crate::fault::Fault;
use crate::request::{Request, TimedEvent, TokenEvent};

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

/// The receiving end of one request. Dropping it aborts the request.
#[derive(Debug)]
pub struct EventReceiver {
    events: mpsc::Receiver<TimedEvent>,
    state: Arc<RequestState>,
    clock: Clock,
    has_ended: bool,
    group: Option<WakeGroup>,
    /// The task that was seen last, and how the group wakes it.
    member: Option<(Waker, Waker)>,
}

impl EventReceiver {
    /// Has the waiting task woken through `group`, whose future must run on the same thread as the task.
    pub fn wake_by(&mut self, group: &WakeGroup) {
        self.group = Some(group.clone());
        self.member = None;
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<TimedEvent>> {
        let Some(group) = &self.group else { return self.events.poll_recv(context) };
        let task = context.waker();
        let (_, member) = match self.member.take() {
            Some(member) if member.0.will_wake(task) => self.member.insert(member),
            _ => self.member.insert((task.clone(), group.waker(task))),
        };
        self.events.poll_recv(&mut Context::from_waker(member))
    }

    /// The next event; `None` after the terminal one. Cancel-safe.
    pub async fn recv(&mut self) -> Option<TokenEvent> {
        self.recv_timed().await.map(|timed| timed.event)
    }

    /// The next event and its time; `None` after the terminal one. Cancel-safe.
    pub async fn recv_timed(&mut self) -> Option<TimedEvent> {
        if self.has_ended {
            return None;
        }
        let timed = poll_fn(|context| self.poll_event(context)).await;
        let timed = timed.unwrap_or_else(|| TimedEvent {
            at: self.clock.now(),
            event: TokenEvent::Failed(SequenceError::EngineDied),
        });
        self.has_ended = timed.event.is_terminal();
        Some(timed)
    }

    /// How long ago `at` was, which is engine time.
    pub fn elapsed(&self, at: Duration) -> Duration {
        self.clock.now().saturating_sub(at)
    }

    /// Where the request is, as of the last step's start.
    pub fn progress(&self) -> Progress {
        self.state.progress(self.clock.now())
    }

    /// Says that the reply has ended by itself, as with a stop string, which only the reader can see: what it
    /// was long enough for teaches the engine how long replies are. Drop the receiver after it.
    pub fn set_complete(&self) {
        self.state.set_complete();
    }

    /// Says whether the reply has a reader. From the next step on, a detached request is
    /// preempted before every attached one.
    pub fn set_detached(&self, is_detached: bool) {
        self.state.set_detached(is_detached);
    }
}

/// Submits requests from any thread. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    published: Arc<Published>,
}

impl EngineHandle {
    pub(super) fn new(commands: Sender<Command>, published: Arc<Published>) -> Self {
        Self { commands, published }
    }

    /// Queues a request; never blocks.
    ///
    /// # Errors
    /// [`SubmitError`] says why nothing was queued.
    pub fn submit(&self, request: Request) -> Result<EventReceiver, SubmitError> {
        let published = &self.published;
        self.check(&request)?;
        let num_cached_tokens = published.num_cached_tokens(&request);
        let outlook = published.outlook(published.waiting(&request, num_cached_tokens));
        published.check_time(&request, &outlook)?;
        let permit = published.take(&outlook.waiting)?;
        let first_token_at = outlook.first_token().map(|time| outlook.now.saturating_add(time));
        self.send(request, num_cached_tokens, permit, RequestState::new(outlook.num_ahead, first_token_at))
    }

    /// Whether a request would get a permit now: a look before the work of making one.
    ///
    /// # Errors
    /// What [`Self::submit`] would say.
    pub fn check_room(&self) -> Result<(), SubmitError> {
        self.check_accepting()?;
        match self.published.num_requests.load(Ordering::Acquire) {
            count if count < self.published.limits.max_num_requests => Ok(()),
            count => Err(self.published.queue_full(count)),
        }
    }

    /// Queues a known-answer request before all others, even if the queue is full. It gets blocks in
    /// the next step, for which other sequences are preempted if need be. One at a time.
    ///
    /// # Errors
    /// [`SubmitError`] says why nothing was queued; [`SubmitError::QueueFull`] is another probe.
    pub fn submit_probe(&self, request: Request) -> Result<EventReceiver, SubmitError> {
        self.check(&request)?;
        if self.published.has_probe.swap(true, Ordering::AcqRel) {
            return Err(self.published.queue_full(self.status().num_requests));
        }
        self.send(request, 0, Permit::Probe, RequestState::new(0, None))
    }

    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        check_request(request, &self.published.limits)?;
        self.check_accepting()
    }

    fn check_accepting(&self) -> Result<(), SubmitError> {
        if self.published.accepting.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(SubmitError::Unavailable("it is shutting down or has failed"))
    }

    fn send(
        &self,
        request: Request,
        num_cached_tokens: usize,
        permit: Permit,
        state: RequestState,
    ) -> Result<EventReceiver, SubmitError> {
        let published = &self.published;
        let arrival = published.clock.now();
        let state = Arc::new(state);
        // Admission, one event a token and the terminal one.
        let (sender, events) = mpsc::channel(request.sampling.max_tokens + 2);
        let submission = Submission {
            request,
            num_cached_tokens,
            arrival,
            permit,
            events: sender,
            state: Arc::clone(&state),
        };
        if self.commands.try_send(Command::Submit(Box::new(submission))).is_err() {
            published.release(permit);
            return Err(SubmitError::Unavailable("its thread has ended"));
        }
        // The thread may have ended between the check and the sending: then nobody takes
        // the request out of the channel any more.
        if !published.alive.load(Ordering::SeqCst) {
            return Err(SubmitError::Unavailable("its thread has ended"));
        }
        Ok(EventReceiver {
            events,
            state,
            clock: published.clock.clone(),
            has_ended: false,
            group: None,
            member: None,
        })
    }

    /// Predicted time to the first token of the first tenant's request without a deadline, submitted now,
    /// if nothing of its prompt is cached. `None` until a prompt was computed and, if all permits are taken,
    /// until a request has ended.
    pub fn estimate(&self, num_prompt_tokens: usize) -> Option<Duration> {
        let request = Request { prompt_token_ids: vec![0; num_prompt_tokens], ..Request::default() };
        self.published.outlook(self.published.waiting(&request, 0)).first_token()
    }

    /// The limits.
    pub fn limits(&self) -> EngineLimits {
        self.published.limits
    }

    /// The latest state. Never waits for the engine.
    pub fn status(&self) -> EngineStatus {
        let published = &self.published;
        let stalled_for = published.is_busy.load(Ordering::Acquire).then(|| {
            let progress_at = Duration::from_nanos(published.progress_at.load(Ordering::Acquire));
            published.clock.now().saturating_sub(progress_at)
        });
        let num_probes = usize::from(published.has_probe.load(Ordering::Acquire));
        EngineStatus {
            accepting: published.accepting.load(Ordering::Acquire),
            alive: published.alive.load(Ordering::Acquire),
            num_steps: published.num_steps.load(Ordering::Relaxed),
            num_requests: published.num_requests.load(Ordering::Acquire) + num_probes,
            stalled_for,
            stall_limit: Duration::from_nanos(published.stall_limit_ns.load(Ordering::Relaxed)),
            fault: published.fault.get().map(|(fault, _)| fault),
        }
    }

    /// What went wrong last and was not cleared, with what [`Self::clear_fault`] has to be told.
    pub fn fault(&self) -> Option<(Fault, FaultGeneration)> {
        self.published.fault.get()
    }

    /// Forgets the fault that was `seen` before a known-answer request that was answered as known. False if
    /// there was another one since, which stays.
    pub fn clear_fault(&self, seen: FaultGeneration) -> bool {
        self.published.fault.clear(seen)
    }

    /// Takes no more requests; what was accepted goes on.
    pub fn drain(&self) {
        self.published.accepting.store(false, Ordering::Release);
    }

    /// Takes no more requests and ends the accepted ones with [`SequenceError::ShuttingDown`].
    pub fn abort_all(&self) {
        self.drain();
        // The channel has room for it beside all requests; if the thread is gone, so are they.
        let _ = self.commands.try_send(Command::AbortAll);
    }
}
