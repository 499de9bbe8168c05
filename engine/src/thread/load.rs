//! Owns what the engine thread publishes about its work, from which the door estimates.
//!
//! Invariant: relaxed atomics only. A reader may mix two moments; the estimate is one anyway.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::cost_model::{CostModel, Load};

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
#[derive(Debug, Default)]
pub(super) struct PublishedLoad {
    num_decodes: AtomicUsize,
    num_running_prefill_tokens: AtomicUsize,
    num_free_slots: AtomicUsize,
    num_slots: AtomicUsize,
    buckets: [Bucket; NUM_BUCKETS],
    /// Submitted and not yet counted in the buckets.
    num_unseen_requests: AtomicUsize,
    num_unseen_tokens: AtomicUsize,
}

impl PublishedLoad {
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
        self.num_running_prefill_tokens.store(load.num_running_prefill_tokens, Ordering::Relaxed);
        self.num_free_slots.store(load.num_free_slots, Ordering::Relaxed);
        self.num_slots.store(load.num_slots, Ordering::Relaxed);
    }

    /// Publishes the queue: time left to the deadline and number of tokens of each request.
    pub(super) fn publish_waiting(&self, waiting: impl Iterator<Item = (Duration, usize)>) {
        let mut counts = [(0, 0); NUM_BUCKETS];
        for (left, num_tokens) in waiting {
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

    /// What a request finds that is submitted now with `deadline`.
    pub(super) fn load(&self, deadline: Duration) -> Load {
        let read = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        let bucket = &self.buckets[bucket_of(deadline)];
        Load {
            num_decodes: read(&self.num_decodes),
            num_running_prefill_tokens: read(&self.num_running_prefill_tokens),
            num_tokens_ahead: read(&bucket.num_tokens) + read(&self.num_unseen_tokens),
            num_requests_ahead: read(&bucket.num_requests) + read(&self.num_unseen_requests),
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
    seconds: [AtomicU64; 4],
    counts: [AtomicU32; 3],
}

impl PublishedCosts {
    pub(super) fn publish(&self, model: &CostModel) {
        let seconds = [model.base_s, model.decode_s, model.prefill_s, model.residence_s];
        for (slot, seconds) in self.seconds.iter().zip(seconds) {
            slot.store(seconds.to_bits(), Ordering::Relaxed);
        }
        let counts = [model.num_prefill_steps, model.num_decode_steps, model.num_residences];
        for (slot, count) in self.counts.iter().zip(counts) {
            slot.store(count, Ordering::Relaxed);
        }
    }

    pub(super) fn model(&self) -> CostModel {
        let [base_s, decode_s, prefill_s, residence_s] =
            self.seconds.each_ref().map(|slot| f64::from_bits(slot.load(Ordering::Relaxed)));
        let [num_prefill_steps, num_decode_steps, num_residences] =
            self.counts.each_ref().map(|slot| slot.load(Ordering::Relaxed));
        CostModel {
            base_s,
            decode_s,
            prefill_s,
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
        let published = PublishedLoad::default();
        let seconds = Duration::from_secs;
        published.publish_waiting([(seconds(0), 10), (seconds(3), 100), (seconds(60), 1000)].into_iter());
        published.add_unseen(7);
        let ahead = |deadline| {
            let load = published.load(deadline);
            (load.num_requests_ahead, load.num_tokens_ahead)
        };
        assert_eq!(ahead(seconds(1)), (2, 17));
        assert_eq!(ahead(seconds(5)), (3, 117));
        assert_eq!(ahead(seconds(60)), (4, 1117));
        assert_eq!(ahead(Duration::MAX), (4, 1117));
        published.sub_unseen(1, 7);
        assert_eq!(ahead(seconds(1)), (1, 10));
    }
}
