//! Owns the scheduler's promises about order, restated from what can be seen outside of it.
//!
//! Must not use the scheduler's own order: a rule checked against itself proves nothing. Shares of tenants
//! are none of its business.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

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
    /// Detached sequences that were preempted although an attached one was newer.
    pub num_detached_preempted: usize,
    /// Requests admitted before an older one.
    pub num_overtakings: usize,
    /// Requests admitted before one of a better priority.
    pub num_priorities_passed_over: usize,
}

impl OrderCheck {
    /// A check of an idle engine.
    pub fn new(honours_priority: bool) -> Self {
        Self { honours_priority, ..Self::default() }
    }

    /// A request was queued.
    pub fn add(&mut self, id: RequestId, request: &Request, due: Duration) {
        let priority = if self.honours_priority { request.priority } else { 0 };
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

    /// To be called before a step.
    pub fn before<R: ModelRunner>(&mut self, engine: &Engine<R>) {
        self.before.clear();
        self.before.extend(engine.running().iter().map(|running| Runner {
            id: running.sequence.id,
            is_probe: running.sequence.is_probe,
            is_detached: running.sequence.is_detached,
            admission: running.sequence.admission.expect("it runs"),
        }));
    }

    /// Checks the step that was just made.
    ///
    /// # Errors
    /// Says which promise is broken.
    pub fn after<R: ModelRunner>(&mut self, engine: &Engine<R>) -> Result<(), String> {
        let is_probe_let_in = self.check_admissions(engine)?;
        let is_back = |id| engine.waiting().iter().any(|sequence| sequence.id == id);
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

    /// Preempted sequences that the last step let in again with blocks of theirs still there.
    pub fn num_cached_again<R: ModelRunner>(&self, engine: &Engine<R>) -> usize {
        let was_running = |id| self.before.iter().any(|runner| runner.id == id);
        let is_first = |id| engine.admitted().iter().any(|(admitted, _)| *admitted == id);
        let shares = engine.plan().sequences.iter();
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
            let equals =
                self.fresh.iter().filter(|(_, f)| (f.tenant, f.priority) == (it.tenant, it.priority));
            if let Some((other, _)) = equals.into_iter().find(|(other, f)| (f.due, **other) < (it.due, id)) {
                return Err(format!("{id:?}, due at {:?}, was admitted before {other:?}", it.due));
            }
            self.num_since = self.num_since.map(|count| count + 1);
            if self.fresh.values().any(|f| f.priority < it.priority) {
                self.num_priorities_passed_over += 1;
                if self.num_since.replace(0).is_some_and(|count| count < FAIR_TURN) {
                    return Err(format!("{id:?} is one of two in {FAIR_TURN} before a better priority"));
                }
            }
            self.num_overtakings += usize::from(self.fresh.keys().next().is_some_and(|&oldest| oldest < id));
            if let Some(waits) = engine.waiting().iter().find(|sequence| sequence.admission.is_some()) {
                return Err(format!("{id:?} was admitted before the preempted {:?}", waits.id));
            }
        }
        if let Some(probe) = self.probes.first() {
            return Err(format!("the probe {probe:?} was not let in at once"));
        }
        Ok(is_probe_let_in)
    }
}
