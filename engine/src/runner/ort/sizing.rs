//! Owns what a model takes of memory, for those who plan: nothing is loaded, and no GPU is needed.
//!
//! Invariant: the KV cache is shared out as when a server starts; only what a start measures is reckoned here.

use super::cuda::facts::DeviceMemory;
use super::cuda::profile::{self, Measured};
use super::{block_bytes, layout};
use crate::error::LoadError;
use crate::model::manifest::{Geometry, Manifest};
use crate::runner::KvCacheLayout;

/// Bytes of a float32 logit and of what is made of it: the number in half precision before it, and the sums and
/// exponentials behind it.
const LOGIT_BYTES: usize = 2 + 5 * size_of::<f32>();
/// Values of half precision that a layer holds for a token at once, in widths of the residual stream: the stream, its
/// update, queries and keys, and the two halves of a gate that is four times as wide.
const WIDTHS: usize = 12;

/// Bytes of the model's files.
pub fn weight_bytes(manifest: &Manifest) -> u64 {
    manifest.files.values().map(|file| file.bytes).sum()
}

/// Bytes of keys and values of one token.
pub fn bytes_per_token(manifest: &Manifest) -> usize {
    block_bytes(&manifest.geometry, &manifest.graph) / manifest.graph.block_size
}

/// The cache that so many bytes hold.
///
/// # Errors
/// They hold no block.
pub fn kv_cache(manifest: &Manifest, num_bytes: usize) -> Result<KvCacheLayout, LoadError> {
    layout(&manifest.geometry, &manifest.graph, num_bytes)
}

/// The cache that is left on a GPU with so many bytes of memory, of which CUDA itself takes nothing.
///
/// # Errors
/// Nothing is left.
pub fn kv_cache_of_gpu(
    manifest: &Manifest,
    total: usize,
    utilization: f64,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
) -> Result<KvCacheLayout, LoadError> {
    let taken = usize::try_from(weight_bytes(manifest)).unwrap_or(usize::MAX);
    let taken = taken.saturating_add(step_bytes(&manifest.geometry, max_num_seqs, max_num_batched_tokens));
    let memory = DeviceMemory { free: total.saturating_sub(taken), total };
    let measured = Measured { memory, graph_bytes: 0, num_graphs: 0 };
    let expansion = profile::expansion(&manifest.geometry, &manifest.graph);
    let num_bytes = profile::cache_bytes(&measured, utilization, expansion).map_err(LoadError::Config)?;
    kv_cache(manifest, num_bytes)
}

/// About what the largest step takes while it runs.
pub fn step_bytes(geometry: &Geometry, max_num_seqs: usize, max_num_batched_tokens: usize) -> usize {
    let rows = max_num_seqs * geometry.padded_vocab_size * LOGIT_BYTES;
    let layer = max_num_batched_tokens * geometry.hidden_size * WIDTHS * 2;
    rows + layer
}
