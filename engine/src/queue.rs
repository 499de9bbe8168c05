//! Owns the waiting sequences and the order in which they are admitted.
//!
//! The probe is first, then whoever was preempted, in order of first admission. Of the others the
//! lowest priority value is next, among those the tenant who was served least for its weight, and
//! of that tenant's requests the earliest deadline. Every [`FAIR_TURN`]th of these admissions takes no
//! notice of priority.
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
pub const FAIR_TURN: u64 = 8;
/// Service of a tenant with weight 1 for an input token.
pub(crate) const INPUT_COST: u64 = 1_000;
/// Service of a tenant with weight 1 for an output token. A step computes one of them where it computes
/// many of a prompt; the factor is that of Sheng et al., "Fairness in Serving Large Language Models"
/// (OSDI 2024), whose counters these are.
pub(crate) const OUTPUT_COST: u64 = 2 * INPUT_COST;

/// Before all tenants: whether it is none of the probes, and a number in order of age.
type HeadKey = (bool, u64);
/// Place in a tenant's queue.
type TenantKey = (i32, Duration, RequestId);

#[derive(Debug, Clone, Copy)]
enum Place {
    Head(HeadKey),
    Tenant(usize, TenantKey),
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
pub struct WaitingQueue {
    head: BTreeMap<HeadKey, WaitingSequence>,
    tenants: Vec<Tenant>,
    places: HashMap<RequestId, Place>,
    /// The tenant whose last waiting request left last.
    last_to_leave: usize,
    num_admitted: u64,
}

impl WaitingQueue {
    /// An empty queue.
    pub fn new(config: &EngineConfig) -> Self {
        let tenant =
            |&weight: &u32| Tenant { weight: u64::from(weight.max(1)), service: 0, waiting: BTreeMap::new() };
        Self {
            head: BTreeMap::new(),
            tenants: config.tenant_weights.iter().map(tenant).collect(),
            // Every running one, the probe too, may be sent back to the queue.
            places: HashMap::with_capacity(config.max_num_seqs + config.max_num_waiting + 1),
            last_to_leave: 0,
            num_admitted: 0,
        }
    }

    /// Sequences in the queue.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// A tenant's service, in thousandths of an input token and divided by its weight.
    pub fn service(&self, tenant: TenantId) -> u64 {
        self.tenants[tenant.0 as usize].service
    }

    /// Adds a sequence.
    pub fn push(&mut self, waiting: WaitingSequence) {
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
        candidates.min_by_key(|(rank, _)| *rank).map(|(_, place)| place)
    }

    fn get(&self, place: Place) -> Option<&Sequence> {
        let waiting = match place {
            Place::Head(key) => self.head.get(&key),
            Place::Tenant(index, key) => self.tenants[index].waiting.get(&key),
        };
        waiting.map(|waiting| &waiting.0)
    }

    /// The next sequence.
    pub fn peek(&self) -> Option<&Sequence> {
        self.get(self.next()?)
    }

    /// Takes the next sequence, which is to be admitted.
    pub fn pop(&mut self) -> Option<WaitingSequence> {
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
        }?;
        self.places.remove(&waiting.0.id);
        Some(waiting)
    }

    /// Takes a sequence that is not to be admitted.
    pub fn remove(&mut self, id: RequestId) -> Option<WaitingSequence> {
        let place = *self.places.get(&id)?;
        self.take(place)
    }

    /// A sequence, to note who reads it.
    pub fn get_mut(&mut self, id: RequestId) -> Option<&mut Sequence> {
        let waiting = match *self.places.get(&id)? {
            Place::Head(key) => self.head.get_mut(&key),
            Place::Tenant(index, key) => self.tenants[index].waiting.get_mut(&key),
        };
        waiting.map(|waiting| &mut waiting.0)
    }

    /// A tenant's tokens are computed for the first time.
    pub fn charge(&mut self, tenant: TenantId, num_input_tokens: usize, num_output_tokens: usize) {
        let cost = INPUT_COST * num_input_tokens as u64 + OUTPUT_COST * num_output_tokens as u64;
        let tenant = &mut self.tenants[tenant.0 as usize];
        tenant.service += cost.div_ceil(tenant.weight);
    }

    /// The sequences in the order in which they would be admitted if all were of one size: tenants take
    /// turns. With one tenant and one priority that is the real order.
    pub fn in_order(&self) -> Vec<&Sequence> {
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
        head.chain(ranked.into_iter().map(|(_, sequence)| sequence)).collect()
    }

    /// Checks that every sequence is where it is said to be, under the key that it has.
    ///
    /// # Errors
    /// Says which one is not.
    pub fn check(&self) -> Result<(), String> {
        let num_waiting: usize = self.tenants.iter().map(|tenant| tenant.waiting.len()).sum();
        if self.head.len() + num_waiting != self.places.len() {
            return Err(format!("{num_waiting} wait beside {:?}, of {:?}", self.head, self.places));
        }
        for (id, place) in &self.places {
            let is_there = self.get(*place).is_some_and(|sequence| {
                sequence.id == *id
                    && match *place {
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
mod tests {
    use super::*;
    use crate::request::Request;

    fn queue(weights: &[u32]) -> WaitingQueue {
        WaitingQueue::new(&EngineConfig { tenant_weights: weights.to_vec(), ..EngineConfig::default() })
    }

    fn waiting(id: u64, tenant: u32, priority: i32, deadline_s: u64) -> WaitingSequence {
        let request = Request {
            prompt_token_ids: vec![1],
            priority,
            tenant: TenantId(tenant),
            deadline: Some(Duration::from_secs(deadline_s)),
            ..Request::default()
        };
        WaitingSequence(Sequence::new(RequestId(id), request, Duration::ZERO))
    }

    /// Ids in the order in which they are taken; each costs its tenant an input token.
    fn drain(queue: &mut WaitingQueue) -> Vec<u64> {
        let taken = std::iter::from_fn(|| {
            let sequence = queue.pop()?.0;
            queue.charge(sequence.tenant, 1, 0);
            Some(sequence.id.0)
        });
        taken.collect()
    }

    #[test]
    fn priority_then_the_least_served_tenant_then_the_deadline() {
        let mut queue = queue(&[1, 1]);
        for (id, tenant, priority, deadline) in
            [(0, 0, 0, 9), (1, 0, 0, 8), (2, 0, 0, 7), (3, 1, 0, 9), (4, 1, 5, 1), (5, 0, -1, 99)]
        {
            queue.push(waiting(id, tenant, priority, deadline));
        }
        assert_eq!(queue.in_order().iter().map(|s| s.id.0).collect::<Vec<_>>(), [5, 2, 3, 1, 0, 4]);
        assert_eq!(queue.check(), Ok(()));
        // 5 was the first tenant's turn.
        assert_eq!(drain(&mut queue), [5, 3, 2, 1, 0, 4]);
    }

    #[test]
    fn a_tenant_who_comes_late_has_saved_nothing_up_and_weights_count() {
        let mut queue = queue(&[1, 3]);
        queue.charge(TenantId(0), 1_000, 0);
        (0..40).for_each(|id| queue.push(waiting(id, 0, 0, id)));
        (100..160).for_each(|id| queue.push(waiting(id, 1, 0, id)));
        assert_eq!(queue.service(TenantId(1)), queue.service(TenantId(0)));
        let taken: Vec<u64> = drain(&mut queue).into_iter().take(40).collect();
        let num_second = taken.iter().filter(|&&id| id >= 100).count();
        assert!((29..=31).contains(&num_second), "{num_second} of 40 at three times the weight");
    }

    #[test]
    fn one_in_eight_takes_no_notice_of_priority() {
        let mut queue = queue(&[1]);
        (0..40).for_each(|id| queue.push(waiting(id, 0, -1, 50 + id)));
        (100..104).for_each(|id| queue.push(waiting(id, 0, 1, id - 100)));
        let taken = drain(&mut queue);
        let places: Vec<usize> = (0..44).filter(|&index| taken[index] >= 100).collect();
        assert_eq!(places, [7, 15, 23, 31]);
    }

    #[test]
    fn probes_and_the_preempted_go_first_and_anybody_can_leave() {
        let mut queue = queue(&[1]);
        let with = |id, is_probe, admission| {
            let mut waiting = waiting(id, 0, 0, id);
            (waiting.0.is_probe, waiting.0.admission) = (is_probe, admission);
            waiting
        };
        for waiting in [
            with(1, false, None),
            with(2, false, None),
            with(3, false, Some(9)),
            with(4, true, None),
            with(5, false, Some(8)),
        ] {
            queue.push(waiting);
        }
        assert!(queue.remove(RequestId(2)).is_some() && queue.remove(RequestId(2)).is_none());
        queue.get_mut(RequestId(1)).unwrap().is_detached = true;
        assert_eq!((queue.len(), queue.check()), (4, Ok(())));
        assert_eq!(drain(&mut queue), [4, 5, 3, 1]);
        assert!(queue.is_empty());
    }
}
