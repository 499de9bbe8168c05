//! Owns the scheduler's promises about order, restated from what can be seen outside of it.
//!
//! Must not use the scheduler's own order: a rule checked against itself proves nothing. Shares of tenants
//! are none of its business.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use glm_engine::Sequence;
use glm_engine::runner::ModelRunner;
use glm_engine::{Engine, Request, RequestId, TenantId, TokenEvent};

/// A running sequence between two steps.
#[derive(Debug, Clone, Copy)]
struct Runner {
    id: RequestId,
    is_probe: bool,
    is_detached: bool,
    admission: u64,
}

/// A request that never had blocks.
#[derive(Debug)]
struct Fresh {
    tenant: TenantId,
    priority: i32,
    /// When its first token is due.
    due: Duration,
}

/// Of so many admissions in a row, one may pass a better priority over.
const FAIR_TURN: usize = 8;

/// Watches the steps of one engine.
#[derive(Debug, Default)]
pub struct OrderCheck {
    honours_priority: bool,
    fresh: BTreeMap<RequestId, Fresh>,
    /// Admissions since one passed a better priority over.
    num_since: Option<usize>,
    probes: BTreeSet<RequestId>,
    before: Vec<Runner>,
    default_deadline: Duration,
    /// Of those that waited before the step: how many tokens each had, and whether it yielded.
    waited: BTreeMap<RequestId, (usize, bool)>,
    /// Of those that ran: tokens at the last admission.
    admitted_with: BTreeMap<RequestId, usize>,
    /// Until when those that were preempted, or never ran, yield if they are detached.
    yields_until: BTreeMap<RequestId, Duration>,
    /// Detached sequences that were preempted although an attached one was newer.
    pub num_detached_preempted: usize,
    /// Requests admitted before an older one.
    pub num_overtakings: usize,
    /// Requests admitted before one of a better priority.
    pub num_priorities_passed_over: usize,
    /// Attached sequences that got blocks while a detached one that was preempted waited.
    pub num_yielded: usize,
}

impl OrderCheck {
    /// A check of an idle engine.
    pub fn new(honours_priority: bool, default_deadline: Duration) -> Self {
        Self { honours_priority, default_deadline, ..Self::default() }
    }

    /// A request was queued.
    pub fn add(&mut self, id: RequestId, request: &Request, due: Duration) {
        let priority = if self.honours_priority { request.priority } else { 0 };
        self.yields_until.insert(id, due);
        self.fresh.insert(id, Fresh { tenant: request.tenant, priority, due });
    }

    /// A probe was queued.
    pub fn add_probe(&mut self, id: RequestId) {
        self.probes.insert(id);
    }

    /// A request was aborted.
    pub fn abort(&mut self, id: RequestId) {
        self.fresh.remove(&id);
        self.probes.remove(&id);
    }

    /// To be called before a step that is planned at `now`.
    pub fn before<R: ModelRunner>(&mut self, engine: &Engine<R>, now: Duration) {
        self.waited = engine
            .scheduler()
            .waiting()
            .into_iter()
            .map(|sequence| (sequence.id, self.waits(sequence, now)))
            .collect();
        self.before.clear();
        self.before.extend(engine.scheduler().running().iter().map(|running| Runner {
            id: running.sequence.id,
            is_probe: running.sequence.is_probe,
            is_detached: running.sequence.is_detached,
            admission: running.sequence.admission.expect("it runs"),
        }));
    }

    /// Its tokens, and whether it lets all attached ones pass.
    fn waits(&self, sequence: &Sequence, now: Duration) -> (usize, bool) {
        let until = self.yields_until.get(&sequence.id);
        let yields = sequence.is_detached && !sequence.is_probe && until.is_some_and(|&until| now < until);
        (sequence.tokens().len(), yields)
    }

    /// Checks the step that was just made, at the same `now`.
    ///
    /// # Errors
    /// Says which promise is broken.
    pub fn after<R: ModelRunner>(&mut self, engine: &Engine<R>, now: Duration) -> Result<(), String> {
        self.check_yielding(engine, now)?;
        let is_probe_let_in = self.check_admissions(engine)?;
        let is_back = |id| engine.scheduler().waiting().iter().any(|sequence| sequence.id == id);
        let (preempted, kept): (Vec<Runner>, Vec<Runner>) =
            self.before.iter().partition(|runner| is_back(runner.id));
        for gone in &preempted {
            if gone.is_probe {
                return Err(format!("the probe {:?} was preempted", gone.id));
            }
            // Whoever ended in this step was kept in it, too.
            for stays in kept.iter().filter(|stays| !stays.is_probe) {
                let is_right = match (gone.is_detached, stays.is_detached) {
                    (true, false) => true,
                    (false, true) => false,
                    _ => gone.admission > stays.admission,
                };
                if !is_right {
                    return Err(format!("{gone:?} was preempted before {stays:?}"));
                }
                self.num_detached_preempted += usize::from(gone.admission < stays.admission);
            }
        }
        let ranked = |runners: &[Runner]| {
            let users = runners.iter().filter(|runner| !runner.is_probe);
            users.map(|runner| (runner.is_detached, runner.admission)).min()
        };
        let is_first_gone = ranked(&preempted).is_some() && ranked(&preempted) == ranked(&self.before);
        let has_probe = is_probe_let_in || self.before.iter().any(|runner| runner.is_probe);
        if is_first_gone && !has_probe {
            return Err(format!("the oldest attached sequence was preempted: {preempted:?}"));
        }
        Ok(())
    }

    /// Nobody who yields was let in before somebody who does not.
    fn check_yielding<R: ModelRunner>(&mut self, engine: &Engine<R>, now: Duration) -> Result<(), String> {
        let let_in = |id: &RequestId| engine.step_plan().sequences.iter().any(|share| share.id == *id);
        let still_waits =
            |id: &RequestId| engine.scheduler().waiting().iter().any(|sequence| sequence.id == *id);
        let yielding = |wanted: bool| self.waited.iter().filter(move |(_, (_, yields))| *yields == wanted);
        if let Some((early, _)) = yielding(true).find(|(id, _)| let_in(id))
            && let Some((late, _)) = yielding(false).find(|(id, _)| still_waits(id))
        {
            return Err(format!("{early:?} yields and was let in, {late:?} waits"));
        }
        let has_preempted = yielding(true).any(|(id, _)| self.admitted_with.contains_key(id));
        self.num_yielded +=
            if has_preempted { yielding(false).filter(|(id, _)| let_in(id)).count() } else { 0 };
        self.admitted_with.extend(
            self.waited.iter().filter(|(id, _)| let_in(id)).map(|(&id, &(num_tokens, _))| (id, num_tokens)),
        );
        for gone in engine.scheduler().waiting() {
            let ran = self.before.iter().any(|runner| runner.id == gone.id);
            // To yield once more costs a token.
            if ran && self.admitted_with.get(&gone.id).is_some_and(|&before| gone.tokens().len() > before) {
                self.yields_until.insert(gone.id, now + self.default_deadline);
            }
        }
        Ok(())
    }

    /// Preempted sequences that the last step let in again with blocks of theirs still there.
    pub fn num_cached_again<R: ModelRunner>(&self, engine: &Engine<R>) -> usize {
        let was_running = |id| self.before.iter().any(|runner| runner.id == id);
        let is_first = |id| engine.admitted().iter().any(|(admitted, _)| *admitted == id);
        let shares = engine.step_plan().sequences.iter();
        shares
            .filter(|share| share.num_computed_tokens > 0 && !was_running(share.id) && !is_first(share.id))
            .count()
    }

    /// Admitted requests were the most urgent ones. Returns whether a probe was among them.
    fn check_admissions<R: ModelRunner>(&mut self, engine: &Engine<R>) -> Result<bool, String> {
        let admitted =
            engine.events().iter().filter(|(_, event)| matches!(event, TokenEvent::Admitted { .. }));
        let mut is_probe_let_in = false;
        for &(id, _) in admitted {
            if self.probes.remove(&id) {
                is_probe_let_in = true;
                continue;
            }
            let it = self.fresh.remove(&id).ok_or_else(|| format!("{id:?} was admitted twice"))?;
            // Among themselves, those that yield go by deadline alone.
            let yields = |id: &RequestId| self.waited.get(id).is_some_and(|(_, yields)| *yields);
            let is_yielding = yields(&id);
            let others = || self.fresh.iter().filter(|(other, _)| yields(other) == is_yielding);
            let equals = others().filter(|(_, f)| (f.tenant, f.priority) == (it.tenant, it.priority));
            if let Some((other, _)) = equals.into_iter().find(|(other, f)| (f.due, **other) < (it.due, id)) {
                return Err(format!("{id:?}, due at {:?}, was admitted before {other:?}", it.due));
            }
            self.num_since = self.num_since.map(|count| count + usize::from(!is_yielding));
            if !is_yielding && others().any(|(_, f)| f.priority < it.priority) {
                self.num_priorities_passed_over += 1;
                if self.num_since.replace(0).is_some_and(|count| count < FAIR_TURN) {
                    return Err(format!("{id:?} is one of two in {FAIR_TURN} before a better priority"));
                }
            }
            self.num_overtakings += usize::from(self.fresh.keys().next().is_some_and(|&oldest| oldest < id));
            let must_be_first = |s: &&&Sequence| s.admission.is_some() && !yields(&s.id);
            if let Some(waits) = engine.scheduler().waiting().iter().find(must_be_first) {
                return Err(format!("{id:?} was admitted before the preempted {:?}", waits.id));
            }
        }
        if let Some(probe) = self.probes.first() {
            return Err(format!("the probe {probe:?} was not let in at once"));
        }
        Ok(is_probe_let_in)
    }
}
