//! Owns what the engine thread publishes about its work, from which admission control estimates.
//!
//! Invariant: relaxed atomics only. A reader may mix two moments; the estimate is one anyway.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use crate::cost_model::{Capacity, CostModel, Hazards, LengthCurve, RequestWork};

const RELAXED: Ordering = Ordering::Relaxed;

/// One running request.
#[derive(Debug, Default)]
struct Running {
    num_computed_tokens: AtomicUsize,
    num_prefill_tokens: AtomicUsize,
    num_output_tokens: AtomicU64,
}

/// What runs, as of the last time it was published.
#[derive(Debug)]
pub(in crate::thread) struct PublishedRunning {
    requests: Box<[Running]>,
    num_running: AtomicUsize,
    num_free_blocks: AtomicUsize,
    max_num_seqs: usize,
}

impl PublishedRunning {
    /// Nothing, where `max_num_seqs` may run, and a probe.
    pub(in crate::thread) fn new(max_num_seqs: usize, num_blocks: usize) -> Self {
        Self {
            requests: (0..=max_num_seqs).map(|_| Running::default()).collect(),
            num_running: AtomicUsize::new(0),
            num_free_blocks: AtomicUsize::new(num_blocks),
            max_num_seqs,
        }
    }

    pub(in crate::thread) fn publish(
        &self,
        running: impl Iterator<Item = RequestWork>,
        num_free_blocks: usize,
    ) {
        let mut num_running = 0;
        for (slot, work) in self.requests.iter().zip(running) {
            slot.num_computed_tokens.store(work.num_held_tokens, RELAXED);
            slot.num_prefill_tokens.store(work.num_prefill_tokens, RELAXED);
            slot.num_output_tokens.store(work.num_output_tokens.to_bits(), RELAXED);
            num_running += 1;
        }
        self.num_running.store(num_running, RELAXED);
        self.num_free_blocks.store(num_free_blocks, RELAXED);
    }

    /// How many requests run.
    pub(in crate::thread) fn len(&self) -> usize {
        self.num_running.load(RELAXED)
    }

    /// What runs.
    pub(in crate::thread) fn running(&self) -> impl Iterator<Item = RequestWork> {
        self.requests.iter().take(self.num_running.load(RELAXED)).map(|slot| {
            let num_computed_tokens = slot.num_computed_tokens.load(RELAXED);
            RequestWork {
                num_cached_tokens: num_computed_tokens,
                num_held_tokens: num_computed_tokens,
                num_prefill_tokens: slot.num_prefill_tokens.load(RELAXED),
                num_output_tokens: f64::from_bits(slot.num_output_tokens.load(RELAXED)),
            }
        })
    }

    /// What may run beside it.
    pub(in crate::thread) fn capacity(&self) -> Capacity {
        Capacity { max_num_seqs: self.max_num_seqs, num_free_blocks: self.num_free_blocks.load(RELAXED) }
    }
}

/// Seconds and means of [`CostModel`].
const NUM_COSTS: usize = 6;

/// The cost model and how long replies are, as of the last step.
#[derive(Debug)]
pub(in crate::thread) struct PublishedCosts {
    costs: [AtomicU64; NUM_COSTS],
    counts: [AtomicU32; 2],
    /// Times that a reply had ended.
    num_ends: AtomicU32,
    hazards: Box<[AtomicU64]>,
}

impl Default for PublishedCosts {
    fn default() -> Self {
        let num_hazards = Hazards::default().len();
        Self {
            costs: Default::default(),
            counts: Default::default(),
            num_ends: AtomicU32::new(0),
            hazards: (0..num_hazards).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

impl PublishedCosts {
    pub(in crate::thread) fn publish(&self, model: &CostModel) {
        let costs = [
            model.base_s,
            model.decode_s,
            model.prefill_s,
            model.pair_s,
            model.drafts_per_decode,
            model.accepted_per_decode,
        ];
        self.costs.iter().zip(costs).for_each(|(slot, cost)| slot.store(cost.to_bits(), RELAXED));
        let counts = [model.num_prefill_steps, model.num_decode_steps];
        self.counts.iter().zip(counts).for_each(|(slot, count)| slot.store(count, RELAXED));
    }

    /// A reply has ended.
    pub(in crate::thread) fn publish_lengths(&self, hazards: &Hazards) {
        self.num_ends.fetch_add(1, RELAXED);
        self.hazards.iter().zip(hazards).for_each(|(slot, hazard)| slot.store(hazard.to_bits(), RELAXED));
    }

    pub(in crate::thread) fn model(&self) -> CostModel {
        let [base_s, decode_s, prefill_s, pair_s, drafts_per_decode, accepted_per_decode] =
            self.costs.each_ref().map(|slot| f64::from_bits(slot.load(RELAXED)));
        let [num_prefill_steps, num_decode_steps] = self.counts.each_ref().map(|slot| slot.load(RELAXED));
        let mut model = CostModel::default();
        (model.base_s, model.decode_s, model.prefill_s, model.pair_s) = (base_s, decode_s, prefill_s, pair_s);
        (model.drafts_per_decode, model.accepted_per_decode) = (drafts_per_decode, accepted_per_decode);
        (model.num_prefill_steps, model.num_decode_steps) = (num_prefill_steps, num_decode_steps);
        model
    }

    /// Whether a reply has ended yet.
    pub(in crate::thread) fn has_lengths(&self) -> bool {
        self.num_ends() > 0
    }

    /// How many ends of replies were published.
    pub(in crate::thread) fn num_ends(&self) -> u32 {
        self.num_ends.load(RELAXED)
    }

    pub(in crate::thread) fn lengths(&self) -> LengthCurve {
        let mut hazards = Hazards::default();
        for (hazard, slot) in hazards.iter_mut().zip(&self.hazards) {
            *hazard = f64::from_bits(slot.load(RELAXED));
        }
        LengthCurve::new(&hazards)
    }
}
