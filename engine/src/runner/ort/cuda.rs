//! Owns what only a GPU needs: CUDA's own runtime, captured steps, and how memory is shared out.

pub(super) mod buckets;
pub(super) mod facts;
pub(super) mod graphs;
pub(super) mod input_layout;
pub(super) mod profile;
pub(super) mod runtime;
