//! Owns what a model folder says of itself: the manifest, its check, and the known answer.

pub mod known_answer;
pub mod manifest;

pub use manifest::Manifest;
