//! Owns the bound on memory that requests' bodies take together, before they are requests.
//!
//! Invariant: nothing waits for memory. A client that sends slowly holds its own share only, and who
//! finds none left is told to come back.

use tokio::sync::{Semaphore, SemaphorePermit};

/// What permits are counted in; a small body costs one.
const UNIT_BYTES: usize = 8 * 1024;

/// Memory for bodies that are being read and converted.
#[derive(Debug)]
pub(crate) struct BodyMemory(Semaphore);

impl BodyMemory {
    /// Room for `num_bytes`.
    pub(crate) fn new(num_bytes: usize) -> Self {
        Self(Semaphore::new(num_bytes.div_ceil(UNIT_BYTES)))
    }

    /// Room for one body, given back on drop; `None` if too many others are being read.
    pub(crate) fn permit(&self, num_bytes: usize) -> Option<SemaphorePermit<'_>> {
        let num_units = u32::try_from(num_bytes.div_ceil(UNIT_BYTES).max(1)).ok()?;
        self.0.try_acquire_many(num_units).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_bounded_and_comes_back() {
        let memory = BodyMemory::new(3 * UNIT_BYTES);
        let large = memory.permit(UNIT_BYTES + 1).unwrap();
        let small = memory.permit(0).unwrap();
        assert!(memory.permit(1).is_none());
        drop((large, small));
        assert!(memory.permit(3 * UNIT_BYTES).is_some());
    }
}
