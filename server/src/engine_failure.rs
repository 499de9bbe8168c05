//! Owns why the engine of a process can't be used any more, and what the process says of it when it ends.

use std::time::Duration;

use glm_engine::Fault;

/// The exit code of a process whose engine failed for good: `EX_SOFTWARE` of sysexits.h. Any other error
/// ends with 1, and a command line that is not understood with 2.
pub const ENGINE_FAILED_EXIT_CODE: u8 = 70;

/// Why the engine of this process can't be used any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineFailure {
    /// The device reported an error after which every call fails.
    #[error("the device failed, and this process can't use it again: the log has the device's own words")]
    DeviceLost,
    /// The engine's thread ended otherwise.
    #[error("the engine thread ended unexpectedly: the log says where it panicked")]
    Died,
    /// The known answer did not come.
    #[error("since a fault ({fault:?}) the engine has not given its known answer for {waited:?}")]
    NotHealed {
        /// The last fault.
        fault: Fault,
        /// How long it was asked.
        waited: Duration,
    },
}
