//! Owns the translation of a step plan into the graph's small inputs.

use ort::session::IoBinding;
use ort::value::Tensor;

use crate::manifest::TensorNames;
use crate::step::StepPlan;

/// Binds everything that changes from step to step. Tensors are owned by the binding's values:
/// borrowed ones deadlock there.
pub(super) fn bind_step(binding: &mut IoBinding, names: &TensorNames, plan: &StepPlan) -> ort::Result<()> {
    // A prompt's early chunks want no row. Kernels are not made for zero rows, so ask for one.
    let logits_indices = if plan.logits_indices.is_empty() { &[0][..] } else { &plan.logits_indices };
    // Bounds for all sequences, and a lower bound of the longest context: it is known exactly.
    let metadata = [plan.max_query_len as i32, plan.max_kv_len as i32, plan.max_kv_len as i32];
    let vectors = [
        (&names.token_ids, &plan.token_ids[..]),
        (&names.cumulative_sequence_length, &plan.cumulative_sequence_length),
        (&names.past_seqlens, &plan.past_seqlens),
        (&names.slot_mapping, &plan.slot_mapping),
        (&names.attention_metadata, &metadata),
        (&names.logits_indices, logits_indices),
    ];
    for (name, values) in vectors {
        binding.bind_input(name, &Tensor::from_array(([values.len()], values.to_vec()))?)?;
    }
    let table = ([plan.sequences.len(), plan.max_num_blocks], plan.block_table.clone());
    binding.bind_input(&names.block_table, &Tensor::from_array(table)?)
}
