//! Owns access to a node's inputs, which may be left out.

use ort::operator::ComputeContext;
use ort::value::{DynTensorValueType, ValueRef};

/// Input `i`, if the node has it.
pub(super) fn input(ctx: &ComputeContext, i: usize) -> ort::Result<Option<ValueRef<'_, DynTensorValueType>>> {
    if i >= ctx.num_inputs()? {
        return Ok(None);
    }
    ctx.input(i)?.map(ValueRef::downcast).transpose()
}
