//! Owns the published fault: what went wrong last, and how often anything went wrong.
//!
//! Invariant: a fault is cleared only by who has seen it. One atomic holds the fault and the number of
//! faults so far, so that a fault between a look and the clearing is not lost.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::fault::Fault;

/// Counts the faults of an engine: names the last one that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultGeneration(u32);

const NONE: u32 = 0;
const NON_FINITE: u32 = 1;
const DEVICE_LOST: u32 = 2;
/// Added to the count of repeated errors.
const REPEATED: u32 = 3;

/// The last fault, for all threads: its generation in the upper half, and what it was in the lower one.
#[derive(Debug, Default)]
pub(in crate::thread) struct PublishedFault(AtomicU64);

impl PublishedFault {
    /// Called by the engine thread.
    pub(in crate::thread) fn set(&self, fault: Fault) {
        let code = match fault {
            Fault::NonFiniteLogits => NON_FINITE,
            Fault::DeviceLost => DEVICE_LOST,
            Fault::RepeatedRunErrors { count } => REPEATED.saturating_add(count),
        };
        // Only one thread sets faults, and a clearing meanwhile leaves the generation as it is.
        let (_, FaultGeneration(generation)) = unpack(self.0.load(Ordering::Acquire));
        self.0.store(pack(code, generation.wrapping_add(1)), Ordering::Release);
    }

    /// The last fault and its generation, unless it was cleared.
    pub(in crate::thread) fn get(&self) -> Option<(Fault, FaultGeneration)> {
        let (code, generation) = unpack(self.0.load(Ordering::Acquire));
        let fault = match code {
            NONE => return None,
            NON_FINITE => Fault::NonFiniteLogits,
            DEVICE_LOST => Fault::DeviceLost,
            code => Fault::RepeatedRunErrors { count: code - REPEATED },
        };
        Some((fault, generation))
    }

    /// Clears the fault of this generation. False if there has been another one since: it stays.
    pub(in crate::thread) fn clear(&self, seen: FaultGeneration) -> bool {
        let cleared = |packed| {
            let (_, generation) = unpack(packed);
            (generation == seen).then(|| pack(NONE, generation.0))
        };
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, cleared).is_ok()
    }
}

fn pack(code: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(code)
}

fn unpack(packed: u64) -> (u32, FaultGeneration) {
    (packed as u32, FaultGeneration((packed >> 32) as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_survive_packing() {
        let published = PublishedFault::default();
        assert_eq!(published.get(), None);
        for fault in [
            Fault::NonFiniteLogits,
            Fault::DeviceLost,
            Fault::RepeatedRunErrors { count: 0 },
            Fault::RepeatedRunErrors { count: u32::MAX - REPEATED },
        ] {
            published.set(fault);
            assert_eq!(published.get().map(|(fault, _)| fault), Some(fault));
        }
        published.set(Fault::RepeatedRunErrors { count: u32::MAX });
        let most = Fault::RepeatedRunErrors { count: u32::MAX - REPEATED };
        assert_eq!(published.get().map(|(fault, _)| fault), Some(most));
    }

    #[test]
    fn a_fault_is_cleared_only_by_who_has_seen_it() {
        let published = PublishedFault::default();
        published.set(Fault::NonFiniteLogits);
        let (_, first) = published.get().unwrap();
        // The same again: to see the one is not to see the other.
        published.set(Fault::NonFiniteLogits);
        assert!(!published.clear(first));
        let (fault, second) = published.get().unwrap();
        assert_eq!(fault, Fault::NonFiniteLogits);
        assert!(published.clear(second));
        assert_eq!(published.get(), None);
        published.set(Fault::NonFiniteLogits);
        assert!(!published.clear(second), "a generation is not used twice");
    }
}
