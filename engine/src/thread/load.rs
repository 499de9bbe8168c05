//! Owns what the engine thread publishes about its work, from which the door estimates. A request's
//! priority is left out of that.
//!
//! Invariant: relaxed atomics only. A reader may mix two moments; the estimate is one anyway.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::cost_model::{CostModel, Load};
use crate::request::TenantId;

/// Deadlines are told apart by powers of two of this.
const FIRST_BOUND: Duration = Duration::from_millis(125);
/// The last bucket has no bound.
const NUM_BUCKETS: usize = 14;

/// The waiting requests with deadlines up to a bound from now.
#[derive(Debug, Default)]
struct Bucket {
    num_requests: AtomicUsize,
    num_tokens: AtomicUsize,
}

/// The engine's work, as of the last time it was published.
#[derive(Debug)]
pub(super) struct PublishedLoad {
    num_decodes: AtomicUsize,
    num_decode_pairs: AtomicUsize,
    num_running_prefill_tokens: AtomicUsize,
    num_free_slots: AtomicUsize,
    num_slots: AtomicUsize,
    buckets: [Bucket; NUM_BUCKETS],
    /// Waiting requests of each tenant.
    num_waiting_of: Box<[AtomicUsize]>,
    /// Submitted and not yet counted in the buckets.
    num_unseen_requests: AtomicUsize,
    num_unseen_tokens: AtomicUsize,
}

impl PublishedLoad {
    /// No load, for so many tenants.
    pub(super) fn new(num_tenants: usize) -> Self {
        Self {
            num_decodes: AtomicUsize::new(0),
            num_decode_pairs: AtomicUsize::new(0),
            num_running_prefill_tokens: AtomicUsize::new(0),
            num_free_slots: AtomicUsize::new(0),
            num_slots: AtomicUsize::new(0),
            buckets: Default::default(),
            num_waiting_of: (0..num_tenants).map(|_| AtomicUsize::new(0)).collect(),
            num_unseen_requests: AtomicUsize::new(0),
            num_unseen_tokens: AtomicUsize::new(0),
        }
    }

    /// A request of `num_tokens` was submitted.
    pub(super) fn add_unseen(&self, num_tokens: usize) {
        self.num_unseen_requests.fetch_add(1, Ordering::Relaxed);
        self.num_unseen_tokens.fetch_add(num_tokens, Ordering::Relaxed);
    }

    /// Requests of `num_tokens` together are counted in the buckets, or gone.
    pub(super) fn sub_unseen(&self, num_requests: usize, num_tokens: usize) {
        self.num_unseen_requests.fetch_sub(num_requests, Ordering::Relaxed);
        self.num_unseen_tokens.fetch_sub(num_tokens, Ordering::Relaxed);
    }

    /// Publishes what runs; the work ahead is left out.
    pub(super) fn publish_running(&self, load: &Load) {
        self.num_decodes.store(load.num_decodes, Ordering::Relaxed);
        self.num_decode_pairs.store(load.num_decode_pairs, Ordering::Relaxed);
        self.num_running_prefill_tokens.store(load.num_running_prefill_tokens, Ordering::Relaxed);
        self.num_free_slots.store(load.num_free_slots, Ordering::Relaxed);
        self.num_slots.store(load.num_slots, Ordering::Relaxed);
    }

    /// Publishes the queue: time left to the deadline, number of tokens and tenant of each request.
    pub(super) fn publish_waiting(&self, waiting: impl Iterator<Item = (Duration, usize, TenantId)>) {
        let mut counts = [(0, 0); NUM_BUCKETS];
        self.num_waiting_of.iter().for_each(|count| count.store(0, Ordering::Relaxed));
        for (left, num_tokens, tenant) in waiting {
            // Nobody else writes.
            self.num_waiting_of[tenant.0 as usize].fetch_add(1, Ordering::Relaxed);
            let (num_requests, total) = &mut counts[bucket_of(left)];
            *num_requests += 1;
            *total += num_tokens;
        }
        let mut sum = (0, 0);
        for (bucket, (num_requests, num_tokens)) in self.buckets.iter().zip(counts) {
            sum = (sum.0 + num_requests, sum.1 + num_tokens);
            bucket.num_requests.store(sum.0, Ordering::Relaxed);
            bucket.num_tokens.store(sum.1, Ordering::Relaxed);
        }
    }

    /// What a request of `tenant` finds that is submitted now with `deadline`.
    pub(super) fn load(&self, deadline: Duration, tenant: TenantId) -> Load {
        let read = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        let bucket = &self.buckets[bucket_of(deadline)];
        let (num_due, num_tokens_due) = (read(&bucket.num_requests), read(&bucket.num_tokens));
        // Tenants take turns, so no more requests of another one go before it than it has itself.
        let num_own = self.num_waiting_of.get(tenant.0 as usize).map_or(0, read);
        let num_of_all = self.num_waiting_of.iter().map(|count| read(count).min(num_own + 1));
        let num_before = num_due.min(num_of_all.sum());
        let num_tokens_before = num_tokens_due * num_before / num_due.max(1);
        Load {
            num_decodes: read(&self.num_decodes),
            num_decode_pairs: read(&self.num_decode_pairs),
            num_running_prefill_tokens: read(&self.num_running_prefill_tokens),
            num_tokens_ahead: num_tokens_before + read(&self.num_unseen_tokens),
            num_requests_ahead: num_before + read(&self.num_unseen_requests),
            num_free_slots: read(&self.num_free_slots),
            num_slots: read(&self.num_slots),
        }
    }
}

/// The first bucket whose bound is not below `left`.
fn bucket_of(left: Duration) -> usize {
    (0..NUM_BUCKETS - 1).find(|&index| left <= FIRST_BOUND * (1 << index)).unwrap_or(NUM_BUCKETS - 1)
}

/// The cost model, as of the last step.
#[derive(Debug, Default)]
pub(super) struct PublishedCosts {
    seconds: [AtomicU64; 5],
    counts: [AtomicU32; 3],
}

impl PublishedCosts {
    pub(super) fn publish(&self, model: &CostModel) {
        let seconds = [model.base_s, model.decode_s, model.prefill_s, model.pair_s, model.residence_s];
        for (slot, seconds) in self.seconds.iter().zip(seconds) {
            slot.store(seconds.to_bits(), Ordering::Relaxed);
        }
        let counts = [model.num_prefill_steps, model.num_decode_steps, model.num_residences];
        for (slot, count) in self.counts.iter().zip(counts) {
            slot.store(count, Ordering::Relaxed);
        }
    }

    pub(super) fn model(&self) -> CostModel {
        let [base_s, decode_s, prefill_s, pair_s, residence_s] =
            self.seconds.each_ref().map(|slot| f64::from_bits(slot.load(Ordering::Relaxed)));
        let [num_prefill_steps, num_decode_steps, num_residences] =
            self.counts.each_ref().map(|slot| slot.load(Ordering::Relaxed));
        CostModel {
            base_s,
            decode_s,
            prefill_s,
            pair_s,
            residence_s,
            num_prefill_steps,
            num_decode_steps,
            num_residences,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_earlier_deadlines_are_ahead() {
        let published = PublishedLoad::new(1);
        let seconds = Duration::from_secs;
        let waiting = [(seconds(0), 10), (seconds(3), 100), (seconds(60), 1000)];
        published.publish_waiting(waiting.into_iter().map(|(left, n)| (left, n, TenantId(0))));
        published.add_unseen(7);
        let ahead = |deadline| {
            let load = published.load(deadline, TenantId(0));
            (load.num_requests_ahead, load.num_tokens_ahead)
        };
        assert_eq!(ahead(seconds(1)), (2, 17));
        assert_eq!(ahead(seconds(5)), (3, 117));
        assert_eq!(ahead(seconds(60)), (4, 1117));
        assert_eq!(ahead(Duration::MAX), (4, 1117));
        published.sub_unseen(1, 7);
        assert_eq!(ahead(seconds(1)), (1, 10));
    }

    #[test]
    fn another_tenants_flood_is_not_ahead() {
        let published = PublishedLoad::new(2);
        let waiting = (0..100).map(|index| (Duration::ZERO, 10, TenantId(u32::from(index % 50 == 0))));
        published.publish_waiting(waiting);
        let ahead = |tenant| {
            let load = published.load(Duration::MAX, TenantId(tenant));
            (load.num_requests_ahead, load.num_tokens_ahead)
        };
        // Two of its own and three of the flood, which has 98.
        assert_eq!((ahead(1), ahead(0)), ((5, 50), (100, 1000)));
    }
}
