//! Owns the loop of the engine thread: commands in, steps, events and published figures out.
//!
//! Invariant: between two steps nothing here waits or locks, and nothing allocates for a token: only a
//! request that comes and the publication of the queue do.

mod ends;
mod publication;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::Receiver;
use tokio::sync::mpsc;

use super::command::{Command, Submission};
use super::published::progress::RequestState;
use super::published::{Permit, Published};
use crate::config::EngineConfig;
use crate::cost_model::{LengthCurve, ReplyLengths, RequestWork};
use crate::engine::Engine;
use crate::error::SequenceError;
use crate::fault::Fault;
use crate::observer::EngineObserver;
use crate::request::{FinishReason, RequestId, TimedEvent, TokenEvent};
use crate::runner::ModelRunner;

/// Clients that are asked in a step whether they are still there, besides those that run; at least so
/// many, and all of them within [`MAX_STEPS_UNASKED`] steps.
const MIN_ASKED: usize = 256;
const MAX_STEPS_UNASKED: usize = 16;

/// The thread's end of a request.
pub(super) struct Client {
    events: mpsc::Sender<TimedEvent>,
    pub(super) state: Arc<RequestState>,
    pub(super) permit: Permit,
    /// Estimated number of tokens of its prompt that the prefix cache holds.
    pub(super) num_cached_tokens: usize,
    is_detached: bool,
    /// Tokens that it got.
    num_tokens: usize,
}

impl Client {
    /// Whether it left, or its reader did, or came back.
    fn has_news(&self) -> bool {
        self.events.is_closed() || self.state.is_detached() != self.is_detached
    }
}

pub(super) struct Worker<R> {
    pub(super) engine: Engine<R>,
    commands: Receiver<Command>,
    pub(super) clients: HashMap<RequestId, Client>,
    /// All clients and some that have ended, the one that was not asked for longest first.
    to_ask: VecDeque<RequestId>,
    /// Those that answered.
    with_news: Vec<RequestId>,
    pub(super) published: Arc<Published>,
    observer: Arc<dyn EngineObserver>,
    pub(super) config: EngineConfig,
    pub(super) lengths: ReplyLengths,
    /// What `lengths` come to, as of the last end of a reply.
    pub(super) curve: LengthCurve,
    /// Whether everything was told to end: what arrives later was on its way when that was said.
    is_aborting: bool,
    /// What the runner said when it failed for good.
    lost_device: Option<SequenceError>,
    pub(super) queue_published_at: Duration,
    /// Of the queue that was published last.
    pub(super) queue_version: u64,
    /// The requests that ran when they were last published.
    pub(super) running_work: Vec<RequestWork>,
}

impl<R: ModelRunner> Worker<R> {
    pub(super) fn new(
        engine: Engine<R>,
        config: EngineConfig,
        commands: Receiver<Command>,
        published: Arc<Published>,
        observer: Arc<dyn EngineObserver>,
    ) -> Self {
        let worker = Self {
            engine,
            commands,
            clients: HashMap::with_capacity(published.limits.max_num_requests + 1),
            to_ask: VecDeque::new(),
            with_news: Vec::new(),
            published,
            observer,
            config,
            lengths: ReplyLengths::default(),
            curve: LengthCurve::new(&ReplyLengths::default().hazards()),
            is_aborting: false,
            lost_device: None,
            queue_published_at: Duration::ZERO,
            queue_version: 0,
            running_work: Vec::new(),
        };
        worker.publish_stall_limit();
        worker
    }

    /// Runs until every handle is dropped, or no step can succeed any more.
    pub(super) fn run(&mut self) {
        let clock = self.published.clock.clone();
        while self.lost_device.is_none() {
            if self.engine.is_idle() {
                self.observer.gauges(&self.engine.scheduler().gauges());
                self.publish(clock.now());
                self.published.is_busy.store(false, Ordering::Release);
                match self.commands.recv() {
                    Ok(command) => {
                        self.note_progress(clock.now());
                        self.published.is_busy.store(true, Ordering::Release);
                        self.handle(command);
                    }
                    Err(_) => return,
                }
            }
            while let Ok(command) = self.commands.try_recv() {
                self.handle(command);
            }
            self.poll_clients();
            if !self.engine.is_idle() {
                self.step();
            }
        }
    }

    fn step(&mut self) {
        let clock = self.published.clock.clone();
        let start = clock.now();
        self.engine.plan(start);
        let admitted = self.engine.admitted().iter().filter(|(_, report)| !report.is_probe);
        admitted.for_each(|(_, report)| self.observer.admitted(report));
        let num_delivered = self.deliver(0, start);
        self.publish(start);
        self.publish_stall_limit();
        // Before the run, too: a long step must not hide what changed at its start.
        self.observe_gauges();
        self.engine.run();
        let end = clock.now();
        let report = self.engine.finish(end - start);
        self.note_progress(end);
        self.published.num_steps.fetch_add(1, Ordering::Relaxed);
        self.published.num_idle_refusals.store(0, Ordering::Relaxed);
        // Before the events: a client that sees a failure finds the fault set.
        if let Some(fault) = report.fault {
            self.published.fault.set(fault);
        }
        if report.is_shrunk {
            tracing::warn!("a step found no memory; from now on steps have fewer tokens of prompts");
        }
        if report.fault == Some(Fault::DeviceLost) {
            self.note_lost_device();
        }
        self.published.costs.publish(self.engine.costs());
        if self.engine.events()[num_delivered..].iter().any(|(_, event)| event.is_terminal()) {
            // A client that sees an end finds it in what is published.
            self.publish_running();
        }
        self.deliver(num_delivered, end);
        self.observer.step(&report);
        self.observe_gauges();
    }

    /// Reports the state; what is still in the command channel waits as well.
    fn observe_gauges(&self) {
        let mut gauges = self.engine.scheduler().gauges();
        gauges.num_waiting += self.commands.len();
        self.observer.gauges(&gauges);
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(submission) if self.is_aborting => {
                self.refuse(*submission, SequenceError::ShuttingDown);
            }
            Command::Submit(submission) => {
                let Submission { request, num_cached_tokens, arrival, permit, events, state } = *submission;
                let is_detached = false;
                let client = Client { events, state, permit, num_cached_tokens, is_detached, num_tokens: 0 };
                let id = match permit {
                    Permit::Probe => self.engine.submit_probe(request, arrival),
                    Permit::Tenant(..) => self.engine.submit(request, arrival),
                };
                self.clients.insert(id, client);
                self.to_ask.push_back(id);
            }
            Command::AbortAll => {
                self.is_aborting = true;
                let ids: Vec<RequestId> = self.clients.keys().copied().collect();
                for id in ids {
                    self.engine.abort(id);
                    self.end(id, SequenceError::ShuttingDown);
                }
            }
        }
    }

    /// Aborts the requests whose receiver was dropped and passes on who is detached.
    fn poll_clients(&mut self) {
        let Self { clients, engine, published, to_ask, with_news, lengths, .. } = self;
        let has_news = |id: &RequestId| clients.get(id).is_some_and(Client::has_news);
        with_news
            .extend(engine.scheduler().running().iter().map(|running| running.sequence.id).filter(has_news));
        let num_asked = to_ask.len().min(MIN_ASKED.max(to_ask.len() / MAX_STEPS_UNASKED));
        for _ in 0..num_asked {
            let Some(id) = to_ask.pop_front().filter(|id| clients.contains_key(id)) else { continue };
            to_ask.push_back(id);
            with_news.extend(has_news(&id).then_some(id));
        }
        let mut has_ended = false;
        for id in with_news.drain(..) {
            let Some(client) = clients.get_mut(&id) else { continue };
            if client.events.is_closed() {
                engine.abort(id);
                if client.num_tokens > 0 && client.permit != Permit::Probe {
                    // Who left without it could have had more.
                    lengths.observe_end(client.num_tokens, client.state.is_complete());
                    has_ended = true;
                }
                published.release(client.permit);
                clients.remove(&id);
            } else if client.has_news() {
                client.is_detached = !client.is_detached;
                engine.set_detached(id, client.is_detached);
            }
        }
        if has_ended {
            self.publish_lengths();
        }
    }

    /// Hands the step's events from the one at `start` on to their channels; returns how many there are.
    fn deliver(&mut self, start: usize, now: Duration) -> usize {
        let mut has_ended = false;
        for (id, event) in &self.engine.events()[start..] {
            let Some(client) = self.clients.get_mut(id) else {
                continue;
            };
            let is_measure = client.permit != Permit::Probe;
            if is_measure && matches!(event, TokenEvent::Token { .. }) {
                self.lengths.observe_tokens(client.num_tokens, 1);
                client.num_tokens += 1;
            }
            if !event.is_terminal() {
                // Fails only if the receiver was dropped: the next step aborts the request.
                let _ = client.events.try_send(TimedEvent { at: now, event: event.clone() });
                continue;
            }
            // A probe is shorter than what users ask for, and a failure is no measure at all.
            if let TokenEvent::Finished { reason, .. } = event
                && is_measure
            {
                let is_early = !matches!(reason, FinishReason::Length);
                self.lengths.observe_end(client.num_tokens, is_early);
                has_ended = true;
            }
            // A client that sees the end finds the permit given back.
            self.published.release(client.permit);
            let _ = client.events.try_send(TimedEvent { at: now, event: event.clone() });
            self.clients.remove(id);
        }
        if has_ended {
            self.publish_lengths();
        }
        self.engine.events().len()
    }

    fn note_progress(&self, now: Duration) {
        self.published.progress_at.store(now.as_nanos() as u64, Ordering::Release);
    }
}
