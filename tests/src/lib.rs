//! Owns what the system tests share: a seeded generator and a proxy that breaks connections.

pub mod fault_proxy;
pub mod rng;
