//! Owns the waiting sequences and the order in which they are admitted.
//!
//! The probe is first, then whoever was preempted, in order of first admission. Of the others the
//! lowest priority value is next, among those the tenant who was served least for its weight, and
//! of that tenant's requests the earliest deadline. Every [`FAIR_TURN`]th of these admissions takes no
//! notice of priority. Detached sequences, which nobody reads, come after all of them, preempted ones too:
//! nobody who is read waits for them.
//!
//! They yield for a bounded time only. A detached sequence takes the place that it would have with a reader
//! at [`Sequence::yields_until`]: at its deadline if it never ran, else at the default deadline after its
//! preemption. That clock starts again only with a preemption after a token that was gained. So under any
//! load, between two of its tokens lie at most the default deadline, what runs then until it ends, and the
//! steps that compute its tokens again.
//!
//! Invariant: nothing starves. A tenant's service only grows, by a token at least with every
//! admission, and a tenant who comes to the queue starts no lower than the least served one that
//! waits; so each waiting tenant is the least served one after a bounded number of fair turns. Within
//! a tenant a fair turn takes the earliest deadline, which is never far after arrival.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use crate::config::EngineConfig;
use crate::request::{RequestId, TenantId};
use crate::sequence::{Sequence, WaitingSequence};

/// One admission in so many takes no notice of priority.
pub(crate) const FAIR_TURN: u64 = 8;
/// Service of a tenant with weight 1 for an input token.
pub(crate) const INPUT_COST: u64 = 1_000;
/// Service of a tenant with weight 1 for an output token. A step computes one of them where it computes
/// many of a prompt; the factor is that of Sheng et al., "Fairness in Serving Large Language Models"
/// (OSDI 2024), whose counters these are.
pub(crate) const OUTPUT_COST: u64 = 2 * INPUT_COST;

/// Before all tenants: whether it is none of the probes, and a number in order of age.
type HeadKey = (bool, u64);
/// Place among the detached: when it stops yielding.
type DetachedKey = (Duration, RequestId);
/// Place in a tenant's queue.
type TenantKey = (i32, Duration, RequestId);

#[derive(Debug, Clone, Copy)]
enum Place {
    Head(HeadKey),
    Tenant(usize, TenantKey),
    Detached(DetachedKey),
}

#[derive(Debug)]
struct Tenant {
    weight: u64,
    /// Cost of all its tokens, divided by its weight.
    service: u64,
    waiting: BTreeMap<TenantKey, WaitingSequence>,
}

impl Tenant {
    fn first(&self) -> Option<TenantKey> {
        self.waiting.first_key_value().map(|(&key, _)| key)
    }

    /// The earliest deadline, whatever its priority: a look at the first request of each.
    fn earliest(&self) -> Option<TenantKey> {
        let first_of = |from| self.waiting.range(from..).next().map(|(&key, _)| key);
        let next = |key: &TenantKey| first_of((key.0 + 1, Duration::ZERO, RequestId(0)));
        std::iter::successors(self.first(), next).min_by_key(|&(_, deadline, id)| (deadline, id))
    }
}

/// The waiting sequences.
#[derive(Debug)]
pub(crate) struct WaitingQueue {
    head: BTreeMap<HeadKey, WaitingSequence>,
    tenants: Vec<Tenant>,
    detached: BTreeMap<DetachedKey, WaitingSequence>,
    places: HashMap<RequestId, Place>,
    /// The tenant whose last waiting request left last.
    last_to_leave: usize,
    num_admitted: u64,
}

impl WaitingQueue {
    /// An empty queue.
    pub(crate) fn new(config: &EngineConfig) -> Self {
        let tenant =
            |&weight: &u32| Tenant { weight: u64::from(weight.max(1)), service: 0, waiting: BTreeMap::new() };
        Self {
            head: BTreeMap::new(),
            tenants: config.tenant_weights.iter().map(tenant).collect(),
            detached: BTreeMap::new(),
            // Every running one, the probe too, may be sent back to the queue.
            places: HashMap::with_capacity(config.max_num_seqs + config.max_num_waiting + 1),
            last_to_leave: 0,
            num_admitted: 0,
        }
    }

    /// Sequences in the queue.
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// A tenant's service, in thousandths of an input token and divided by its weight.
    pub(crate) fn service(&self, tenant: TenantId) -> u64 {
        self.tenants[tenant.0 as usize].service
    }

    /// Adds a sequence; a detached one yields until [`Self::promote`] says otherwise.
    pub(crate) fn push(&mut self, mut waiting: WaitingSequence) {
        let sequence = &mut waiting.0;
        sequence.is_yielding = sequence.is_detached && !sequence.is_probe;
        if sequence.is_yielding {
            let key = (sequence.yields_until, sequence.id);
            self.places.insert(sequence.id, Place::Detached(key));
            self.detached.insert(key, waiting);
        } else {
            self.push_attached(waiting);
        }
    }

    /// Gives detached sequences whose time to yield is over at `now` the position that they would have with a
    /// reader. Returns whether there were any.
    pub(crate) fn promote(&mut self, now: Duration) -> bool {
        let mut any = false;
        while let Some(first) = self.detached.first_entry()
            && first.key().0 <= now
        {
            let mut waiting = first.remove();
            waiting.0.is_yielding = false;
            self.push_attached(waiting);
            any = true;
        }
        any
    }

    fn push_attached(&mut self, waiting: WaitingSequence) {
        let sequence = &waiting.0;
        let id = sequence.id;
        let place = match sequence.admission {
            Some(admission) => Place::Head((!sequence.is_probe, admission)),
            None if sequence.is_probe => Place::Head((false, id.0)),
            None => {
                let key = (sequence.priority, sequence.deadline, id);
                Place::Tenant(sequence.tenant.0 as usize, key)
            }
        };
        match place {
            Place::Head(key) => drop(self.head.insert(key, waiting)),
            Place::Tenant(index, key) => {
                if self.tenants[index].waiting.is_empty() {
                    // Who did not ask has saved nothing up.
                    let floor = self.least_service();
                    self.tenants[index].service = self.tenants[index].service.max(floor);
                }
                self.tenants[index].waiting.insert(key, waiting);
            }
            Place::Detached(key) => drop(self.detached.insert(key, waiting)),
        }
        self.places.insert(id, place);
    }

    /// Service of the least served tenant that waits, else of the one that waited last.
    fn least_service(&self) -> u64 {
        let waiting = self.tenants.iter().filter(|tenant| !tenant.waiting.is_empty());
        let last = || self.tenants.get(self.last_to_leave).map_or(0, |tenant| tenant.service);
        waiting.map(|tenant| tenant.service).min().unwrap_or_else(last)
    }

    /// Where the next sequence stands.
    fn next(&self) -> Option<Place> {
        if let Some((&key, _)) = self.head.first_key_value() {
            return Some(Place::Head(key));
        }
        let is_fair_turn = self.num_admitted % FAIR_TURN == FAIR_TURN - 1;
        let candidates = self.tenants.iter().enumerate().filter_map(|(index, tenant)| {
            let key = if is_fair_turn { tenant.earliest() } else { tenant.first() }?;
            let priority = if is_fair_turn { 0 } else { key.0 };
            Some(((priority, tenant.service, key.1, key.2), Place::Tenant(index, key)))
        });
        let attached = candidates.min_by_key(|(rank, _)| *rank).map(|(_, place)| place);
        attached.or_else(|| self.detached.first_key_value().map(|(&key, _)| Place::Detached(key)))
    }

    fn get(&self, place: Place) -> Option<&Sequence> {
        let waiting = match place {
            Place::Head(key) => self.head.get(&key),
            Place::Tenant(index, key) => self.tenants[index].waiting.get(&key),
            Place::Detached(key) => self.detached.get(&key),
        };
        waiting.map(|waiting| &waiting.0)
    }

    /// The next sequence.
    pub(crate) fn peek(&self) -> Option<&Sequence> {
        self.get(self.next()?)
    }

    /// Takes the next sequence, which is to be admitted.
    pub(crate) fn pop(&mut self) -> Option<WaitingSequence> {
        let place = self.next()?;
        self.num_admitted += u64::from(matches!(place, Place::Tenant(..)));
        self.take(place)
    }

    fn take(&mut self, place: Place) -> Option<WaitingSequence> {
        let waiting = match place {
            Place::Head(key) => self.head.remove(&key),
            Place::Tenant(index, key) => {
                let waiting = self.tenants[index].waiting.remove(&key);
                if self.tenants[index].waiting.is_empty() {
                    self.last_to_leave = index;
                }
                waiting
            }
            Place::Detached(key) => self.detached.remove(&key),
        }?;
        self.places.remove(&waiting.0.id);
        Some(waiting)
    }

    /// Takes a sequence that is not to be admitted.
    pub(crate) fn remove(&mut self, id: RequestId) -> Option<WaitingSequence> {
        let place = *self.places.get(&id)?;
        self.take(place)
    }

    /// Says whether a sequence has a reader, which may change its position. False if it is not there.
    pub(crate) fn set_detached(&mut self, id: RequestId, is_detached: bool) -> bool {
        let Some(mut waiting) = self.remove(id) else { return false };
        waiting.0.is_detached = is_detached;
        self.push(waiting);
        true
    }

    /// A tenant's tokens are computed for the first time.
    pub(crate) fn charge(&mut self, tenant: TenantId, num_input_tokens: usize, num_output_tokens: usize) {
        let cost = INPUT_COST * num_input_tokens as u64 + OUTPUT_COST * num_output_tokens as u64;
        let tenant = &mut self.tenants[tenant.0 as usize];
        tenant.service += cost.div_ceil(tenant.weight);
    }

    /// The sequences in the order in which they would be admitted if all were of one size: tenants take
    /// turns. With one tenant and one priority that is the real order.
    pub(crate) fn in_order(&self) -> Vec<&Sequence> {
        let mut ranked = Vec::with_capacity(self.len());
        for tenant in &self.tenants {
            let mut turn = (i32::MIN, 0);
            for (&(priority, deadline, id), waiting) in &tenant.waiting {
                turn = if turn.0 == priority { (priority, turn.1 + 1) } else { (priority, 0) };
                ranked.push(((turn, tenant.service, deadline, id), &waiting.0));
            }
        }
        ranked.sort_unstable_by_key(|(rank, _)| *rank);
        let head = self.head.values().map(|waiting| &waiting.0);
        let detached = self.detached.values().map(|waiting| &waiting.0);
        head.chain(ranked.into_iter().map(|(_, sequence)| sequence)).chain(detached).collect()
    }

    /// Checks that every sequence is where it is said to be, under the key that it has.
    ///
    /// # Errors
    /// Says which one is not.
    pub(crate) fn check(&self) -> Result<(), String> {
        let num_waiting: usize = self.tenants.iter().map(|tenant| tenant.waiting.len()).sum();
        if self.head.len() + self.detached.len() + num_waiting != self.places.len() {
            let (head, detached) = (&self.head, &self.detached);
            return Err(format!("{num_waiting} wait beside {head:?} and {detached:?}, of {:?}", self.places));
        }
        for (id, place) in &self.places {
            let is_there = self.get(*place).is_some_and(|sequence| {
                sequence.id == *id
                    && sequence.is_yielding == matches!(place, Place::Detached(_))
                    && match *place {
                        Place::Detached(key) => sequence.is_detached && key.0 == sequence.yields_until,
                        Place::Head(key) => key.0 != sequence.is_probe,
                        Place::Tenant(index, key) => {
                            (index, key.0, key.1)
                                == (sequence.tenant.0 as usize, sequence.priority, sequence.deadline)
                                && sequence.admission.is_none()
                        }
                    }
            });
            if !is_there {
                return Err(format!("{id:?} is not at {place:?}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
