//! Owns what the system tests share: a proxy that breaks connections, and what the fuzzers try.

pub mod fault_proxy;
pub mod fuzz;
