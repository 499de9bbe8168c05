//! Owns the loop of the engine thread: commands in, steps, events and published figures out.
//!
//! Invariant: between two steps nothing here waits or locks, and nothing allocates for a token: only a
//! request that comes and the publication of the queue do.

mod ends;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::Receiver;
use tokio::sync::mpsc;

use super::fault::Fault;
use super::handle::{Command, Submission};
use super::progress::{RequestState, Stage};
use super::shared::{Place, Shared};
use crate::config::EngineConfig;
use crate::cost_model::{CostModel, Load, StepWork};
use crate::engine::Engine;
use crate::error::SequenceError;
use crate::observer::{EngineObserver, StepReport};
use crate::request::{RequestId, TokenEvent};
use crate::runner::ModelRunner;
use crate::sequence::Sequence;

/// How long the published queue may stand although nothing moved in it: estimates change.
const QUEUE_PERIOD: Duration = Duration::from_millis(100);
/// Up to here the queue is published whenever it changes; a longer one takes too long for that.
const SHORT_QUEUE: usize = 64;
/// Clients that are asked in a step whether they are still there, besides those that run; at least so
/// many, and all of them within [`MAX_STEPS_UNASKED`] steps.
const MIN_ASKED: usize = 256;
const MAX_STEPS_UNASKED: usize = 16;

/// The thread's end of a request.
struct Client {
    events: mpsc::Sender<TokenEvent>,
    state: Arc<RequestState>,
    place: Place,
    /// A guess of what its prompt finds.
    num_cached_tokens: usize,
    is_detached: bool,
    admitted_at: Option<Duration>,
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
    clients: HashMap<RequestId, Client>,
    /// All clients and some that have ended, the one that was not asked for longest first.
    to_ask: VecDeque<RequestId>,
    /// Those that answered.
    with_news: Vec<RequestId>,
    next_id: u64,
    shared: Arc<Shared>,
    observer: Arc<dyn EngineObserver>,
    config: EngineConfig,
    costs: CostModel,
    num_run_errors: u32,
    /// Whether everything was told to end: what arrives later was on its way when that was said.
    is_aborting: bool,
    /// What the runner said when it failed for good.
    lost_device: Option<SequenceError>,
    queue_published_at: Duration,
    /// Requests and tokens taken from the channel since the queue was last published.
    seen: (usize, usize),
}

impl<R: ModelRunner> Worker<R> {
    pub(super) fn new(
        engine: Engine<R>,
        config: EngineConfig,
        commands: Receiver<Command>,
        shared: Arc<Shared>,
        observer: Arc<dyn EngineObserver>,
    ) -> Self {
        let worker = Self {
            engine,
            commands,
            clients: HashMap::with_capacity(shared.limits.max_num_requests + 1),
            to_ask: VecDeque::new(),
            with_news: Vec::new(),
            next_id: 0,
            shared,
            observer,
            config,
            costs: CostModel::default(),
            num_run_errors: 0,
            is_aborting: false,
            lost_device: None,
            queue_published_at: Duration::ZERO,
            seen: (0, 0),
        };
        worker.publish_stall_limit();
        worker.shared.load.publish_running(&worker.load());
        worker
    }

    /// Runs until every handle is dropped, or no step can succeed any more.
    pub(super) fn run(&mut self) {
        let clock = self.shared.clock.clone();
        while self.lost_device.is_none() {
            if self.engine.is_idle() {
                self.observer.gauges(&self.engine.gauges());
                self.publish(clock.now());
                self.shared.is_busy.store(false, Ordering::Release);
                match self.commands.recv() {
                    Ok(command) => {
                        self.note_progress(clock.now());
                        self.shared.is_busy.store(true, Ordering::Release);
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
        let clock = self.shared.clock.clone();
        let start = clock.now();
        let decodes = self.engine.decodes();
        let prefill_budget = self.costs.prefill_budget(&decodes, &self.shared.bounds);
        self.engine.set_draft_price(self.costs.draft_price(&decodes));
        self.engine.plan_step(start, prefill_budget);
        self.engine.admitted().iter().for_each(|(_, report)| self.observer.admitted(report));
        let num_delivered = self.deliver(0, start);
        self.publish(start);
        self.publish_stall_limit();
        // Before the run, too: a long step must not hide what changed at its start.
        self.observe_gauges();
        let mut report = self.engine.run_step();
        let end = clock.now();
        report.duration = end - start;
        self.note_progress(end);
        self.shared.num_steps.fetch_add(1, Ordering::Relaxed);
        self.shared.num_idle_refusals.store(0, Ordering::Relaxed);
        // Before the events: whoever sees a failure finds the fault set.
        self.learn(&report);
        self.deliver(num_delivered, end);
        self.observer.step(&report);
        self.observe_gauges();
    }

    /// Reports the state; what is still in the command channel waits as well.
    fn observe_gauges(&self) {
        let mut gauges = self.engine.gauges();
        gauges.num_waiting += self.commands.len();
        self.observer.gauges(&gauges);
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(submission) if self.is_aborting => {
                self.refuse(submission, SequenceError::ShuttingDown);
            }
            Command::Submit(submission) => {
                // Named here, not at the door: ids must grow in the order in which the engine sees them.
                let id = RequestId(self.next_id);
                self.next_id += 1;
                self.seen.0 += 1;
                self.seen.1 += submission.num_tokens();
                let Submission { request, num_cached_tokens, arrival, place, events, state } = submission;
                let is_detached = false;
                let client =
                    Client { events, state, place, num_cached_tokens, is_detached, admitted_at: None };
                self.clients.insert(id, client);
                self.to_ask.push_back(id);
                if place == Place::Probe {
                    self.engine.add_probe(id, request, arrival);
                } else {
                    self.engine.add(id, request, arrival);
                }
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
        let Self { clients, engine, shared, to_ask, with_news, .. } = self;
        let has_news = |id: &RequestId| clients.get(id).is_some_and(Client::has_news);
        with_news.extend(engine.running().iter().map(|running| running.sequence.id).filter(has_news));
        let num_asked = to_ask.len().min(MIN_ASKED.max(to_ask.len() / MAX_STEPS_UNASKED));
        for _ in 0..num_asked {
            let Some(id) = to_ask.pop_front().filter(|id| clients.contains_key(id)) else { continue };
            to_ask.push_back(id);
            with_news.extend(has_news(&id).then_some(id));
        }
        for id in with_news.drain(..) {
            let Some(client) = clients.get_mut(&id) else { continue };
            if client.events.is_closed() {
                engine.abort(id);
                shared.release(client.place);
                clients.remove(&id);
            } else if client.has_news() {
                client.is_detached = !client.is_detached;
                engine.set_detached(id, client.is_detached);
            }
        }
    }

    /// Hands the step's events from the one at `start` on to their channels; returns how many there are.
    fn deliver(&mut self, start: usize, now: Duration) -> usize {
        for (id, event) in &self.engine.events()[start..] {
            let Some(client) = self.clients.get_mut(id) else {
                continue;
            };
            if matches!(event, TokenEvent::Admitted { .. }) {
                client.admitted_at = Some(now);
            }
            if !event.is_terminal() {
                // Fails only if the receiver was dropped: the next step aborts the request.
                let _ = client.events.try_send(event.clone());
                continue;
            }
            // A probe is shorter than what users ask for, and a failure is no measure at all.
            let is_measure = client.place != Place::Probe && matches!(event, TokenEvent::Finished { .. });
            if let Some(admitted_at) = client.admitted_at.filter(|_| is_measure) {
                self.costs.observe_residence(now.saturating_sub(admitted_at));
                self.shared.costs.publish(&self.costs);
            }
            // Whoever sees the end finds the place free.
            self.shared.release(client.place);
            let _ = client.events.try_send(event.clone());
            self.clients.remove(id);
        }
        self.engine.events().len()
    }

    fn learn(&mut self, report: &StepReport) {
        if report.failed {
            self.num_run_errors = self.num_run_errors.saturating_add(1);
            if self.num_run_errors >= self.config.max_consecutive_run_errors {
                self.shared.fault.set(Fault::RepeatedRunErrors { count: self.num_run_errors });
            }
        } else {
            self.num_run_errors = 0;
            self.costs.observe_step(&StepWork::of(self.engine.plan()), report.duration);
        }
        if report.num_non_finite > 0 {
            self.shared.fault.set(Fault::NonFiniteLogits);
        }
        if report.lost_device {
            self.shared.fault.set(Fault::DeviceLost);
            self.note_lost_device();
        }
        self.shared.costs.publish(&self.costs);
    }

    fn note_progress(&self, now: Duration) {
        self.shared.progress_at.store(now.as_nanos() as u64, Ordering::Release);
    }

    fn publish_stall_limit(&self) {
        let EngineConfig { stall_factor, stall_min, .. } = self.config;
        let limit = match self.costs.predict_step(&StepWork::of(self.engine.plan())) {
            Some(predicted) => predicted.saturating_mul(stall_factor).max(stall_min),
            None => stall_min.saturating_mul(stall_factor),
        };
        let nanos = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        self.shared.stall_limit_ns.store(nanos, Ordering::Relaxed);
    }

    /// What runs.
    fn load(&self) -> Load {
        let StepWork { num_decodes, num_pairs: num_decode_pairs, .. } = self.engine.decodes();
        let num_pending: usize =
            self.engine.running().iter().map(|running| running.num_pending_tokens()).sum();
        let num_running = self.engine.running().len();
        let num_free_slots = self.engine.num_free_slots();
        Load {
            num_decodes,
            num_decode_pairs,
            num_running_prefill_tokens: num_pending - num_decodes,
            num_free_slots,
            num_slots: (num_running + num_free_slots).max(1),
            ..Load::default()
        }
    }

    /// Publishes what runs and, if anything moved or some time has passed, the queue.
    fn publish(&mut self, now: Duration) {
        let load = self.load();
        self.shared.load.publish_running(&load);
        self.publish_running(now, load);
        let is_due = now.saturating_sub(self.queue_published_at) >= QUEUE_PERIOD;
        let has_changed = self.engine.take_queue_changed() || self.seen.0 > 0;
        if is_due || (has_changed && self.engine.num_waiting() <= SHORT_QUEUE) {
            self.queue_published_at = now;
            self.publish_waiting(now, load);
            // Only now: a request must not be missing from both counts.
            let (num_requests, num_tokens) = std::mem::take(&mut self.seen);
            self.shared.load.sub_unseen(num_requests, num_tokens);
        }
    }

    fn publish_running(&self, now: Duration, mut load: Load) {
        load.num_running_prefill_tokens = 0;
        load.num_free_slots = 1;
        for running in self.engine.running() {
            let Some(client) = self.clients.get(&running.sequence.id) else { continue };
            let num_pending = running.num_pending_tokens();
            let num_tokens = running.sequence.tokens().len();
            if num_pending == 1 && !running.sequence.output().is_empty() {
                client.state.publish(Stage::Decode, None);
                continue;
            }
            let stage = Stage::Prefill { num_computed_tokens: running.num_computed_tokens, num_tokens };
            let next_token_at = self.next_token_at(now, &load, running.num_computed_tokens, num_pending);
            client.state.publish(stage, next_token_at);
            load.num_running_prefill_tokens += num_pending;
        }
    }

    fn publish_waiting(&self, now: Duration, mut load: Load) {
        let waiting = self.engine.waiting();
        for (position, sequence) in waiting.iter().enumerate() {
            let (num_cached_tokens, num_tokens) = self.num_tokens(sequence);
            if let Some(client) = self.clients.get(&sequence.id) {
                let next_token_at = self.next_token_at(now, &load, num_cached_tokens, num_tokens);
                client.state.publish(Stage::Waiting { position }, next_token_at);
            }
            load.num_tokens_ahead += num_tokens;
            load.num_requests_ahead += 1;
        }
        self.shared.load.publish_waiting(waiting.iter().map(|sequence| {
            // Whoever was preempted goes before all deadlines.
            let left = sequence.deadline.saturating_sub(now);
            let left = if sequence.admission.is_some() { Duration::ZERO } else { left };
            // And who waits detached behind all of them.
            let left = if sequence.is_yielding { Duration::MAX } else { left };
            (left, self.num_tokens(sequence).1, sequence.tenant)
        }));
    }

    /// About how many tokens of a waiting sequence are cached, and how many are to be computed.
    fn num_tokens(&self, sequence: &Sequence) -> (usize, usize) {
        let num_cached_tokens = self.clients.get(&sequence.id).map_or(0, |client| client.num_cached_tokens);
        (num_cached_tokens, sequence.tokens().len() - num_cached_tokens)
    }

    fn next_token_at(
        &self,
        now: Duration,
        load: &Load,
        num_cached_tokens: usize,
        num_tokens: usize,
    ) -> Option<Duration> {
        let time = self.costs.time_to_first_token(load, num_cached_tokens, num_tokens, &self.shared.bounds);
        time.map(|time| now.saturating_add(time))
    }
}
