//! Owns what can be wrong with an engine that still runs.

/// Why the engine should not be trusted until a known answer was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Logits were not numbers.
    NonFiniteLogits,
    /// Steps in a row that failed.
    RepeatedRunErrors {
        /// How many.
        count: u32,
    },
    /// The device failed in a way that only a new process heals. The engine thread has ended.
    DeviceLost,
}
