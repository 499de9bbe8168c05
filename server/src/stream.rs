//! The seam between the engine and HTTP: one pump a request, one bounded log, any number of readers.

pub mod connection;
pub mod connections;
pub mod cursor;
pub mod event;
pub mod event_log;
pub mod generation;
pub mod memory_store;
pub mod names;
pub mod pump;
pub mod readers;
pub mod reply_stream;
pub mod sse;
pub mod store;
pub mod time_limits;
mod worker_wakes;
