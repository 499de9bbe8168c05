//! The engine in virtual time: machines that compute nothing, requests that come by a seed, and what the scheduler
//! promises, restated.
//!
//! It needs the engine and nothing above it, so it is built with overflow checks and debug assertions in little time.

pub mod cache;
pub mod machine;
pub mod order;
pub mod overload;
pub mod rng;
