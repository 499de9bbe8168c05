//! The seam between the engine and HTTP: one pump a request, one bounded log, any number of readers.

pub mod event_log;
pub mod pump;
pub mod sse;
