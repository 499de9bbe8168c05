//! Owns the translation of a step plan into the graph's small inputs.
//!
//! Invariant: a step of the last one's shapes allocates nothing: its values are written where the last one's were.

use ort::session::IoBinding;
use ort::value::Tensor;

use crate::model::manifest::TensorNames;
use crate::step::StepPlan;

/// The small inputs of steps of any shape, in host memory. Tensors are owned: borrowed ones deadlock in a binding.
#[derive(Debug)]
pub(super) struct Inputs {
    /// In the order of [`TensorNames::small_inputs`]; none before the first step.
    tensors: [Option<Tensor<i32>>; 7],
    /// Whether the graph reads them on a device, to which binding copies them.
    on_device: bool,
}

impl Inputs {
    pub(super) fn new(on_device: bool) -> Self {
        Self { tensors: Default::default(), on_device }
    }

    /// Writes a step's values and binds what is not bound.
    pub(super) fn bind(
        &mut self,
        binding: &mut IoBinding,
        names: &TensorNames,
        plan: &StepPlan,
    ) -> ort::Result<()> {
        // A prompt's early chunks want no row. Kernels are not made for zero rows, so ask for one.
        let logits_indices = if plan.logits_indices.is_empty() { &[0][..] } else { &plan.logits_indices };
        // Bounds for all sequences, and a lower bound of the longest context: it is known exactly.
        let metadata = [plan.max_query_len as i32, plan.max_kv_len as i32, plan.max_kv_len as i32];
        let table_shape = [plan.sequences.len(), plan.max_num_blocks];
        let inputs: [(&[i32], &[usize]); 7] = [
            (&plan.token_ids, &[plan.token_ids.len()]),
            (&plan.cumulative_sequence_length, &[plan.cumulative_sequence_length.len()]),
            (&plan.past_seqlens, &[plan.past_seqlens.len()]),
            (&plan.block_table, &table_shape),
            (&plan.slot_mapping, &[plan.slot_mapping.len()]),
            (&metadata, &[metadata.len()]),
            (logits_indices, &[logits_indices.len()]),
        ];
        for ((name, tensor), (values, shape)) in
            names.small_inputs().into_iter().zip(&mut self.tensors).zip(inputs)
        {
            match tensor {
                Some(tensor) if has_shape(tensor, shape) => {
                    tensor.extract_tensor_mut().1.copy_from_slice(values);
                    if self.on_device {
                        binding.bind_input(name, tensor)?;
                    }
                }
                tensor => {
                    let new = Tensor::from_array((shape, values.to_vec()))?;
                    binding.bind_input(name, &new)?;
                    *tensor = Some(new);
                }
            }
        }
        Ok(())
    }
}

fn has_shape(tensor: &Tensor<i32>, shape: &[usize]) -> bool {
    tensor.shape().iter().copied().eq(shape.iter().map(|&size| size as i64))
}
