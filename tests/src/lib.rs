//! Owns what the system tests share: a seeded generator, a proxy that breaks connections, and what the
//! scheduler promises, restated.

pub mod cache;
pub mod fault_proxy;
pub mod fuzz;
pub mod machine;
pub mod order;
pub mod overload;
pub mod rng;
