//! Owns a server's engine in virtual time under more requests than it can serve: the real thread and its admission control,
//! on a machine whose steps take what [`Speed`] says.
//!
//! While the engine works, requests are submitted by its own thread, inside its steps, at the very times they are
//! due: so each run of a seed is the same, whatever else the computer does. Must not read a clock.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use glm_engine::StepWork;
use glm_engine::runner::{KvCacheLayout, ModelRunner};
use glm_engine::{
    Clock, EngineConfig, EngineHandle, EngineThread, EventReceiver, Logits, NoObserver, Request, RequestId,
    RunError, SamplingParams, StepOutput, StepPlan, SubmitError, TenantId,
};
use ndarray::{Array2, s};

use crate::machine::{Speed, VOCAB_SIZE};
use crate::rng::Rng;

const BLOCK_SIZE: usize = 16;
const STOP: u32 = 2;
const WORD: u32 = 5;
/// What the server asks for before it is ready: tokens of a prompt, and of its reply.
pub const WARM_UP: [(usize, usize); 4] = [(12, 4), (12, 4), (128, 1), (128, 1)];

/// A request that comes.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// When, from the end of the warm-up.
    pub at: Duration,
    /// Tokens of its prompt.
    pub num_prompt_tokens: usize,
    /// Tokens that it may have.
    pub max_tokens: usize,
    /// Tokens after which its reply ends by itself.
    pub length: usize,
    /// Whose it is.
    pub tenant: u32,
    /// Its priority.
    pub priority: i32,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq)]
pub enum Fate {
    /// Not known yet.
    Pending,
    /// Refused by admission control, and asked to come again in so much time.
    Refused(Duration),
    /// Admitted after so much time.
    Admitted(Duration),
    /// Accepted, and still waiting when its limit had passed.
    TimedOut,
}

/// A machine and what it is to serve.
#[derive(Debug, Clone)]
pub struct Overload {
    /// How fast it is.
    pub speed: Speed,
    /// The first step takes so many times as long.
    pub first_step: u32,
    /// Steps vary by up to this part.
    pub noise: f64,
    /// The engine's limits.
    pub config: EngineConfig,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
    /// Longest time in the queue; `None` refuses nobody.
    pub limit: Option<Duration>,
    /// In the order of their times.
    pub arrivals: Vec<Arrival>,
    /// Of the noise.
    pub seed: u64,
}

/// What happened.
#[derive(Debug)]
pub struct Played {
    /// Of each arrival.
    pub fates: Vec<Fate>,
    /// From the end of the warm-up to that of the last reply.
    pub duration: Duration,
    /// Tokens of all replies.
    pub num_tokens: usize,
}

struct Accepted {
    index: usize,
    receiver: Option<EventReceiver>,
}

struct Stage {
    overload: Overload,
    handle: Option<EngineHandle>,
    start: Duration,
    coming: VecDeque<usize>,
    /// By the engine's number of the request, after those of the warm-up.
    accepted: Vec<Accepted>,
    fates: Vec<Fate>,
    num_tokens: usize,
}

impl Stage {
    /// Submits the next arrival.
    fn submit_next(&mut self) {
        let (Some(index), Some(handle)) = (self.coming.pop_front(), &self.handle) else { return };
        let arrival = &self.overload.arrivals[index];
        let request = Request {
            max_queue_time: self.overload.limit,
            tenant: TenantId(arrival.tenant),
            priority: arrival.priority,
            ..request(arrival.num_prompt_tokens, arrival.max_tokens, index)
        };
        match handle.submit(request) {
            Ok(receiver) => self.accepted.push(Accepted { index, receiver: Some(receiver) }),
            Err(SubmitError::QueueTimeUnmeetable { retry_after, .. }) => {
                self.fates[index] = Fate::Refused(retry_after);
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Gives up on those that still wait at their limit, as a server does.
    fn time_out(&mut self, now: Duration) {
        let Some(limit) = self.overload.limit else { return };
        for Accepted { index, receiver } in &mut self.accepted {
            let arrival = self.start + self.overload.arrivals[*index].at;
            if self.fates[*index] == Fate::Pending && now > arrival + limit {
                self.fates[*index] = Fate::TimedOut;
                *receiver = None;
            }
        }
    }

    fn note_admissions(&mut self, plan: &StepPlan, now: Duration) {
        for scheduled in &plan.sequences {
            let Some(accepted) = self.accepted_of(scheduled.id) else { continue };
            if self.fates[accepted] == Fate::Pending {
                let arrival = self.start + self.overload.arrivals[accepted].at;
                self.fates[accepted] = Fate::Admitted(now.saturating_sub(arrival));
            }
        }
    }

    fn accepted_of(&self, id: RequestId) -> Option<usize> {
        let number = (id.0 as usize).checked_sub(WARM_UP.len())?;
        self.accepted.get(number).map(|accepted| accepted.index)
    }

    /// Whether the next token of a sequence with so many ends its reply.
    fn ends(&self, id: RequestId, num_tokens: usize) -> bool {
        self.accepted_of(id).is_some_and(|index| {
            let arrival = &self.overload.arrivals[index];
            num_tokens >= arrival.num_prompt_tokens + arrival.length
        })
    }
}

struct Runner {
    stage: Arc<Mutex<Stage>>,
    now: Arc<AtomicU64>,
    num_blocks: usize,
    num_steps: u32,
    rng: Rng,
    logits: Array2<f32>,
}

impl Runner {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.now.load(Ordering::SeqCst))
    }

    fn set_now(&self, now: Duration) {
        self.now.store(now.as_nanos() as u64, Ordering::SeqCst);
    }
}

impl ModelRunner for Runner {
    fn kv_cache(&self) -> KvCacheLayout {
        KvCacheLayout { num_blocks: self.num_blocks, block_size: BLOCK_SIZE, num_bytes: 0 }
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        let stage = Arc::clone(&self.stage);
        let mut stage = stage.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = self.now();
        stage.note_admissions(plan, begin);
        let factor = if self.num_steps == 0 { f64::from(stage.overload.first_step) } else { 1.0 };
        let noise = 1.0 + stage.overload.noise * (self.rng.range(0..=1_000) as f64 / 500.0 - 1.0);
        self.num_steps += 1;
        let end = begin + stage.overload.speed.time(&StepWork::of(plan)).mul_f64(factor * noise);
        while let Some(&index) = stage.coming.front() {
            let at = stage.start + stage.overload.arrivals[index].at;
            if stage.handle.is_none() || at > end {
                break;
            }
            self.set_now(at.max(begin));
            stage.submit_next();
        }
        self.set_now(end);
        stage.time_out(end);
        let num_rows = plan.logits_indices.len();
        stage.num_tokens += num_rows;
        self.logits = Array2::zeros((num_rows, VOCAB_SIZE));
        for scheduled in &plan.sequences {
            let num_tokens = scheduled.num_computed_tokens + scheduled.num_scheduled_tokens;
            let token = if stage.ends(scheduled.id, num_tokens) { STOP } else { WORD };
            scheduled.logits_rows().for_each(|row| self.logits[[row, token as usize]] = 9.0);
        }
        Ok(StepOutput { candidates: None, logits: Logits::Here(self.logits.slice(s![..num_rows, ..])) })
    }
}

/// A request of so many tokens; no two of different salts are alike, so that nothing is cached.
pub fn request(num_prompt_tokens: usize, max_tokens: usize, salt: usize) -> Request {
    let sampling = SamplingParams {
        temperature: 0.0,
        max_tokens,
        stop_token_ids: vec![STOP],
        ..SamplingParams::default()
    };
    let token = |position: usize| ((position + (salt >> (position % 16))) % 7) as u32;
    Request { prompt_token_ids: (0..num_prompt_tokens).map(token).collect(), sampling, ..Request::default() }
}

impl Overload {
    /// Plays it to its end.
    pub fn play(&self) -> Played {
        let now = Arc::new(AtomicU64::new(0));
        let stage = Arc::new(Mutex::new(Stage {
            overload: self.clone(),
            handle: None,
            start: Duration::ZERO,
            coming: (0..self.arrivals.len()).collect(),
            accepted: Vec::new(),
            fates: vec![Fate::Pending; self.arrivals.len()],
            num_tokens: 0,
        }));
        let runner = Runner {
            stage: Arc::clone(&stage),
            now: Arc::clone(&now),
            num_blocks: self.num_blocks,
            num_steps: 0,
            rng: Rng::new(self.seed),
            logits: Array2::zeros((0, VOCAB_SIZE)),
        };
        let read = Arc::clone(&now);
        let clock = Clock::new(move || Duration::from_nanos(read.load(Ordering::SeqCst)));
        let spawned =
            EngineThread::spawn_by(clock, runner, self.config.clone(), VOCAB_SIZE, Arc::new(NoObserver));
        let (handle, thread) = spawned.unwrap_or_else(|error| panic!("{error}"));
        for (num_prompt_tokens, max_tokens) in WARM_UP {
            let probe = handle.submit_probe(request(num_prompt_tokens, max_tokens, 0));
            let _events = probe.unwrap_or_else(|error| panic!("{error}"));
            wait_idle(&handle);
        }
        {
            let mut stage = stage.lock().unwrap_or_else(PoisonError::into_inner);
            stage.start = Duration::from_nanos(now.load(Ordering::SeqCst));
            stage.handle = Some(handle.clone());
            stage.num_tokens = 0;
        }
        loop {
            let mut idle = stage.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(&index) = idle.coming.front() else { break };
            // Nothing happens before the next one comes.
            let at = idle.start + idle.overload.arrivals[index].at;
            now.fetch_max(at.as_nanos() as u64, Ordering::SeqCst);
            idle.submit_next();
            drop(idle);
            wait_idle(&handle);
        }
        let mut stage = stage.lock().unwrap_or_else(PoisonError::into_inner);
        let end = Duration::from_nanos(now.load(Ordering::SeqCst));
        let duration = end.saturating_sub(stage.start);
        stage.handle = None;
        let fates = std::mem::take(&mut stage.fates);
        let num_tokens = stage.num_tokens;
        drop((stage, handle));
        thread.join();
        Played { fates, duration, num_tokens }
    }
}

/// Waits until the engine has nothing to do, and has published that.
pub fn wait_idle(handle: &EngineHandle) {
    while handle.status().num_requests > 0 || handle.status().stalled_for.is_some() {
        std::thread::sleep(Duration::from_millis(1));
    }
}
