//! Owns what the system tests share: a seeded generator, and later servers and clients in process.

pub mod order;
pub mod rng;
