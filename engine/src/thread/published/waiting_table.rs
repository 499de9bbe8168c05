//! Owns the table of requests that wait: admission control enters them, the engine thread strikes them out.
//!
//! Invariant: an entry is written before it is marked as taken, and by one thread at a time; atomics only.
//! So a request that is on its way to the engine thread is seen by the next one that is submitted. A reader may mix
//! two moments; what it makes of them is an estimate anyway.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::queue::FAIR_TURN;
use crate::request::TenantId;

const RELAXED: Ordering = Ordering::Relaxed;

/// What an entry is.
const FREE: u64 = 0;
/// Its request runs, or is being entered.
const TAKEN: u64 = 1;
const WAITING: u64 = 2;
/// It was preempted and goes before all that never ran.
const PREEMPTED: u64 = 3;

/// Where a request stands in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::thread) struct EntryIndex(usize);

/// A request that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::thread) struct Waiting {
    pub(in crate::thread) tenant: TenantId,
    /// 0 where priorities don't count.
    pub(in crate::thread) priority: i32,
    /// Engine time.
    pub(in crate::thread) deadline: Duration,
    pub(in crate::thread) num_cached_tokens: usize,
    pub(in crate::thread) num_prefill_tokens: usize,
    /// Tokens that it must and may generate, and that it has.
    pub(in crate::thread) min_tokens: usize,
    pub(in crate::thread) max_tokens: usize,
    pub(in crate::thread) num_output_tokens: usize,
}

#[derive(Debug, Default)]
struct Entry {
    state: AtomicU64,
    /// Tenant and priority.
    owner: AtomicU64,
    deadline_ns: AtomicU64,
    num_cached_tokens: AtomicUsize,
    num_prefill_tokens: AtomicUsize,
    min_tokens: AtomicUsize,
    max_tokens: AtomicUsize,
    num_output_tokens: AtomicUsize,
}

impl Entry {
    fn write(&self, waiting: &Waiting, state: u64) {
        let owner = u64::from(waiting.tenant.0) << 32 | u64::from(waiting.priority as u32);
        self.owner.store(owner, RELAXED);
        let nanos = u64::try_from(waiting.deadline.as_nanos()).unwrap_or(u64::MAX);
        self.deadline_ns.store(nanos, RELAXED);
        self.num_cached_tokens.store(waiting.num_cached_tokens, RELAXED);
        self.num_prefill_tokens.store(waiting.num_prefill_tokens, RELAXED);
        self.min_tokens.store(waiting.min_tokens, RELAXED);
        self.max_tokens.store(waiting.max_tokens, RELAXED);
        self.num_output_tokens.store(waiting.num_output_tokens, RELAXED);
        self.state.store(state, Ordering::Release);
    }

    fn read(&self) -> Waiting {
        let owner = self.owner.load(RELAXED);
        Waiting {
            tenant: TenantId((owner >> 32) as u32),
            priority: owner as u32 as i32,
            deadline: Duration::from_nanos(self.deadline_ns.load(RELAXED)),
            num_cached_tokens: self.num_cached_tokens.load(RELAXED),
            num_prefill_tokens: self.num_prefill_tokens.load(RELAXED),
            min_tokens: self.min_tokens.load(RELAXED),
            max_tokens: self.max_tokens.load(RELAXED),
            num_output_tokens: self.num_output_tokens.load(RELAXED),
        }
    }
}

/// The requests that wait.
#[derive(Debug)]
pub(in crate::thread) struct WaitingTable {
    entries: Box<[Entry]>,
    /// Where the next one may find room.
    next: AtomicUsize,
    weights: Box<[u32]>,
    /// What tenants were served, as of the last time it was published.
    services: Box<[AtomicU64]>,
}

impl WaitingTable {
    /// An empty table for so many requests of tenants with these weights.
    pub(in crate::thread) fn new(max_num_requests: usize, weights: &[u32]) -> Self {
        Self {
            entries: (0..max_num_requests).map(|_| Entry::default()).collect(),
            next: AtomicUsize::new(0),
            weights: weights.iter().map(|&weight| weight.max(1)).collect(),
            services: weights.iter().map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Enters a request; `None` if the table is full.
    pub(in crate::thread) fn enter(&self, waiting: &Waiting) -> Option<EntryIndex> {
        let len = self.entries.len();
        let start = self.next.fetch_add(1, RELAXED);
        let index = (0..len).map(|offset| start.wrapping_add(offset) % len).find(|&index| {
            let state = &self.entries[index].state;
            state.load(RELAXED) == FREE
                && state.compare_exchange(FREE, TAKEN, Ordering::Acquire, RELAXED).is_ok()
        })?;
        self.entries[index].write(waiting, WAITING);
        Some(EntryIndex(index))
    }

    /// A request runs.
    pub(in crate::thread) fn set_running(&self, EntryIndex(index): EntryIndex) {
        self.entries[index].state.store(TAKEN, RELAXED);
    }

    /// A request was preempted.
    pub(in crate::thread) fn set_preempted(&self, EntryIndex(index): EntryIndex, waiting: &Waiting) {
        self.entries[index].write(waiting, PREEMPTED);
    }

    /// A request ended.
    pub(in crate::thread) fn strike(&self, EntryIndex(index): EntryIndex) {
        self.entries[index].state.store(FREE, Ordering::Release);
    }

    /// What the tenants were served so far.
    pub(in crate::thread) fn publish_services(&self, service: impl Fn(TenantId) -> u64) {
        for (index, slot) in self.services.iter().enumerate() {
            slot.store(service(TenantId(index as u32)), RELAXED);
        }
    }

    /// The requests that are admitted before `own`, about in that order. `cost` is what one is charged for
    /// in the shares of tenants, in thousandths of an input token.
    pub(in crate::thread) fn ahead(&self, own: &Waiting, cost: impl Fn(&Waiting) -> f64) -> Vec<Waiting> {
        let (mut ahead, mut alike) = (Vec::new(), Vec::new());
        // Those that a turn without priority takes before this one.
        let mut num_due = 0;
        for entry in &self.entries {
            let state = entry.state.load(Ordering::Acquire);
            if state < WAITING {
                continue;
            }
            let waiting = entry.read();
            if state == PREEMPTED {
                ahead.push(waiting);
                continue;
            }
            num_due += usize::from(waiting.deadline <= own.deadline);
            match waiting.priority.cmp(&own.priority) {
                std::cmp::Ordering::Less => ahead.push(waiting),
                std::cmp::Ordering::Equal => alike.push(waiting),
                std::cmp::Ordering::Greater => {}
            }
        }
        alike.sort_unstable_by_key(|waiting| waiting.deadline);
        self.take_turns(own, &alike, cost, &mut ahead);
        ahead.truncate(FAIR_TURN as usize * (num_due + 1));
        ahead
    }

    /// Of requests of one priority in the order of their deadlines, adds those to `ahead` that come before
    /// `own`: its tenant's earlier ones, and of each other tenant what it is served meanwhile.
    fn take_turns(
        &self,
        own: &Waiting,
        alike: &[Waiting],
        cost: impl Fn(&Waiting) -> f64,
        ahead: &mut Vec<Waiting>,
    ) {
        let is_before = |waiting: &&Waiting| waiting.tenant == own.tenant && waiting.deadline <= own.deadline;
        let weight = |tenant: TenantId| f64::from(self.weights[tenant.0 as usize]);
        let service = |tenant: TenantId| self.services[tenant.0 as usize].load(RELAXED) as f64;
        let own_cost: f64 = alike.iter().filter(is_before).map(&cost).sum();
        // Who comes to the queue has saved nothing up.
        let least = alike.iter().map(|waiting| service(waiting.tenant)).fold(f64::INFINITY, f64::min);
        let is_there = alike.iter().any(|waiting| waiting.tenant == own.tenant);
        let own_service = service(own.tenant);
        let own_service = if is_there || !least.is_finite() { own_service } else { own_service.max(least) };
        let until = own_service + own_cost / weight(own.tenant);
        let mut served: Vec<(TenantId, f64)> = Vec::new();
        for waiting in alike {
            if waiting.tenant == own.tenant {
                ahead.extend(is_before(&waiting).then_some(*waiting));
                continue;
            }
            let index = served.iter().position(|(tenant, _)| *tenant == waiting.tenant);
            let index = index.unwrap_or_else(|| {
                served.push((waiting.tenant, service(waiting.tenant)));
                served.len() - 1
            });
            let served = &mut served[index].1;
            if *served <= until {
                ahead.push(*waiting);
                *served += cost(waiting) / weight(waiting.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(tenant: u32, priority: i32, deadline_s: u64) -> Waiting {
        Waiting {
            tenant: TenantId(tenant),
            priority,
            deadline: Duration::from_secs(deadline_s),
            num_cached_tokens: 0,
            num_prefill_tokens: 10,
            min_tokens: 0,
            max_tokens: 5,
            num_output_tokens: 0,
        }
    }

    fn table(weights: &[u32], waiting: impl IntoIterator<Item = Waiting>) -> WaitingTable {
        let table = WaitingTable::new(1_000, weights);
        waiting.into_iter().for_each(|waiting| assert!(table.enter(&waiting).is_some()));
        table
    }

    fn num_ahead(table: &WaitingTable, own: &Waiting) -> usize {
        table.ahead(own, |_| 1_000.0).len()
    }

    #[test]
    fn better_priorities_and_earlier_deadlines_are_ahead() {
        let all =
            [(0, 9), (0, 3), (1, 1), (-1, 60)].map(|(priority, deadline)| waiting(0, priority, deadline));
        let table = table(&[1], all);
        assert_eq!(num_ahead(&table, &waiting(0, 0, 5)), 2);
        assert_eq!(num_ahead(&table, &waiting(0, -1, 59)), 0);
        assert_eq!(num_ahead(&table, &waiting(0, 1, 60)), 4);
    }

    #[test]
    fn one_admission_in_eight_takes_no_notice_of_priority() {
        let table = table(&[1], (0..100).map(|_| waiting(0, -1, 60)));
        // The first turn without priority is its own.
        assert_eq!(num_ahead(&table, &waiting(0, 1, 50)), 8);
    }

    #[test]
    fn another_tenants_flood_is_ahead_by_its_share_only() {
        let flood = (0..100).map(|_| waiting(1, 0, 9)).chain([waiting(0, 0, 9), waiting(0, 0, 9)]);
        let table = table(&[1, 2], flood);
        // Two of its own, and of the flood twice that and the one that is next.
        assert_eq!(num_ahead(&table, &waiting(0, 0, 9)), 2 + 5);
        assert_eq!(num_ahead(&table, &waiting(1, 0, 9)), 102);
        // The flood was served before.
        table.publish_services(|tenant| u64::from(tenant.0) * 1_500);
        assert_eq!(num_ahead(&table, &waiting(0, 0, 9)), 2 + 2);
    }

    #[test]
    fn entries_are_struck_out_and_the_preempted_go_first() {
        let table = WaitingTable::new(2, &[1]);
        let first = table.enter(&waiting(0, 0, 9)).unwrap();
        let second = table.enter(&waiting(0, 0, 9)).unwrap();
        assert_eq!(table.enter(&waiting(0, 0, 9)), None);
        table.set_running(first);
        assert_eq!(num_ahead(&table, &waiting(0, -1, 1)), 0);
        table.set_preempted(first, &waiting(0, 0, 9));
        assert_eq!(num_ahead(&table, &waiting(0, -1, 1)), 1);
        table.strike(second);
        assert_eq!(num_ahead(&table, &waiting(0, 0, 9)), 1);
        assert!(table.enter(&waiting(0, 0, 9)).is_some());
    }
}
