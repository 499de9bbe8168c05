//! Owns how a GPU's memory is shared out: what the largest steps were seen to take, and what is left for the cache.

use super::facts::DeviceMemory;
use crate::model::manifest::{Geometry, Graph};
use crate::request::RequestId;
use crate::runner::ort::options::OrtOptions;
use crate::step::StepPlan;

/// What is left free beside everything that was measured: work memory that libraries take when they first meet a
/// product of another shape, and memory that is lost between pieces.
const MARGIN: usize = 256 << 20;
const MIB: usize = 1 << 20;

/// What was seen of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::runner::ort) struct Measured {
    /// After the largest steps.
    pub(in crate::runner::ort) memory: DeviceMemory,
    /// What a captured step takes for itself.
    pub(in crate::runner::ort) graph_bytes: usize,
    /// How many will be captured.
    pub(in crate::runner::ort) num_graphs: usize,
}

/// A step as large as any may be: as many sequences, of which one is as long as a sequence may be and one has all
/// tokens that are left, with a row of logits for each. It writes nothing, and reads the first block again and again.
pub(in crate::runner::ort) fn largest_step(
    geometry: &Geometry,
    graph: &Graph,
    options: &OrtOptions,
) -> StepPlan {
    let num_blocks = geometry.max_model_len.div_ceil(graph.block_size);
    let blocks = vec![0; num_blocks];
    let num_tokens = options.max_num_batched_tokens.max(options.max_num_seqs);
    let num_decodes = options.max_num_seqs.min(num_tokens.saturating_sub(1));
    let mut plan = StepPlan::default();
    plan.clear(num_blocks);
    for sequence in 0..num_decodes {
        let num_computed_tokens = if sequence == 0 { geometry.max_model_len - 1 } else { 0 };
        plan.push(RequestId(0), [0], num_computed_tokens, &blocks, graph.block_size, 1);
    }
    let num_left = (num_tokens - num_decodes).min(geometry.max_model_len);
    plan.push(RequestId(0), vec![0; num_left], 0, &blocks, graph.block_size, 1);
    plan.slot_mapping.fill(-1);
    plan
}

/// Bytes that attention takes for the keys and values of one token while it computes a step with prompts, where it
/// first expands those of all sequences, a layer at a time.
pub(in crate::runner::ort) fn expansion(geometry: &Geometry, graph: &Graph) -> [usize; 2] {
    let in_cache = geometry.kv_bytes_per_token(graph.kv_cache_dtype);
    let one_layer = 2 * geometry.num_kv_heads * geometry.head_dim * 2;
    [in_cache, if graph.kv_cache_dtype.is_quantised() { one_layer } else { 0 }]
}

/// Bytes for the cache.
///
/// # Errors
/// There are none; says what takes the memory.
pub(in crate::runner::ort) fn cache_bytes(
    measured: &Measured,
    utilization: f64,
    [in_cache, expanded]: [usize; 2],
) -> Result<usize, String> {
    let Measured { memory: DeviceMemory { free, total }, graph_bytes, num_graphs } = *measured;
    let kept_free = (total as f64 * (1.0 - utilization)) as usize;
    let graphs = graph_bytes.saturating_mul(num_graphs);
    let left = free.saturating_sub(kept_free).saturating_sub(graphs).saturating_sub(MARGIN);
    // Of each token's bytes some are needed to expand it.
    let bytes = (left as u128 * in_cache as u128 / (in_cache + expanded).max(1) as u128) as usize;
    if bytes == 0 {
        return Err(format!(
            "no memory is left for the KV cache: of the GPU's {} MiB, {} MiB are taken (weights, the largest step, other \
             processes), --gpu-memory-utilization {utilization} leaves {} MiB free, and CUDA graphs and a margin need {} \
             MiB; choose a smaller precision, --max-num-seqs or --max-num-batched-tokens, or a higher utilization",
            total / MIB,
            total.saturating_sub(free) / MIB,
            kept_free / MIB,
            (graphs + MARGIN) / MIB
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: usize = 1 << 30;

    fn measured(free: usize) -> Measured {
        let memory = DeviceMemory { free, total: 80 * GIB };
        Measured { memory, graph_bytes: 16 * MIB, num_graphs: 28 }
    }

    #[test]
    fn the_cache_takes_what_is_left() {
        let left = 60 * GIB - 8 * GIB - 28 * 16 * MIB - MARGIN;
        assert!(cache_bytes(&measured(60 * GIB), 0.9, [28, 0]).unwrap().abs_diff(left) < MIB);
        // One byte of eight is needed to expand.
        assert!(cache_bytes(&measured(60 * GIB), 0.9, [7, 1]).unwrap().abs_diff(left / 8 * 7) < MIB);
    }

    #[test]
    fn what_is_missing_is_said() {
        let error = cache_bytes(&measured(8 * GIB), 0.9, [1, 0]).unwrap_err();
        assert!(error.contains("of the GPU's 81920 MiB, 73728 MiB are taken"), "{error}");
        assert!(error.contains("--gpu-memory-utilization 0.9"), "{error}");
    }
}
