//! The load generator: closed loops of streams, or an open loop of arrivals, against any OpenAI-compatible server.
//!
//! [`run()`] measures what [`BenchArgs`] ask for. Only the client's clock reads the time.

mod args;
mod error;
mod load;
mod report;
mod run;
mod sample;
mod server_side;
mod workload;

pub use args::BenchArgs;
pub use error::BenchError;
pub use report::{BenchReport, RunReport, Spread};
pub use run::run;
