//! Owns what the system tests share: a seeded generator, a proxy that breaks connections, and the order of starts.

pub mod fault_proxy;
pub mod order;
pub mod rng;
