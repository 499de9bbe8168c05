//! Owns the operator `PagedAttention` as ONNX Runtime sees it: its inputs, attributes and threads.
//!
//! Invariant: a row of the output depends, to the last bit, on its own sequence's tokens only: not on
//! the batch, the chunks a sequence came in, the blocks it lies in, the number of threads or, AMX's apart, the
//! instruction set. And no panic crosses into ONNX Runtime: bad inputs are errors that name the input.

mod attend;
mod attributes;
mod batch;
mod call;
mod element;
mod exp;
mod kernels;
mod kv_cache;
mod lanes;
mod level;
mod plan;
mod products;
mod rope;
mod simd;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod workspace;

use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use half::bf16;
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::{
    DynTensorValueType, PrimitiveTensorElementType, Shape, TensorElementType, ValueRef, ValueType,
};

use crate::isa;
use crate::parallel::{SessionThreads, threads_of_session, with_workspace};
use attributes::{Attributes, Source};
use batch::{Batch, Inputs, Tensor};
use element::Element;
use kv_cache::KvCache;
use simd::Simd;
use workspace::Workspace;

/// Whether the instruction set that the environment names is one that this CPU has.
///
/// # Errors
/// As [`isa::choose`].
pub(crate) fn check_forced() -> Result<(), String> {
    Simd::choose(isa::forced().as_deref()).map(drop)
}

/// The schema's inputs in order; those that this kernel requires, and those it refuses. The caches'
/// type is the kernel's.
const INPUTS: [(&str, TensorElementType, Presence); 17] = {
    use Presence::{Optional, Refused, Required};
    use TensorElementType::{Float32, Int32, Undefined};
    [
        ("query", Float32, Required),
        ("key", Float32, Refused),
        ("value", Float32, Refused),
        ("key_cache", Undefined, Required),
        ("value_cache", Undefined, Required),
        ("cumulative_sequence_length", Int32, Required),
        ("past_seqlens", Int32, Required),
        ("block_table", Int32, Required),
        ("cos_cache", Float32, Optional),
        ("sin_cache", Float32, Optional),
        ("slot_mapping", Int32, Optional),
        ("head_sink", Float32, Refused),
        ("q_norm_weight", Float32, Refused),
        ("k_norm_weight", Float32, Refused),
        ("k_scale", Float32, Refused),
        ("v_scale", Float32, Refused),
        // Bounds that only GPU kernels need; they may be given.
        ("attention_metadata", Int32, Optional),
    ]
};

#[derive(Clone, Copy, PartialEq)]
enum Presence {
    Required,
    Optional,
    Refused,
}

/// Adds the operator over each type of cache. `num_threads` is how many the sessions have, 0 for one a
/// core; `bit_exact` does without AMX.
///
/// # Errors
/// When ONNX Runtime refuses it.
pub(super) fn add_to(
    domain: OperatorDomain,
    num_threads: usize,
    bit_exact: bool,
) -> ort::Result<OperatorDomain> {
    let domain = domain.add(PagedAttention::<f32>::new(num_threads, bit_exact))?;
    domain.add(PagedAttention::<bf16>::new(num_threads, bit_exact))
}

/// The operator over caches of `E`. Its kernels, one a layer, run one after the other and share a
/// workspace.
struct PagedAttention<E> {
    num_threads: usize,
    bit_exact: bool,
    workspace: Arc<Mutex<Workspace>>,
    cache: PhantomData<E>,
}

impl<E> PagedAttention<E> {
    /// The operator for sessions of `num_threads` threads; 0 is one a core.
    fn new(num_threads: usize, bit_exact: bool) -> Self {
        let num_threads = threads_of_session(num_threads);
        Self { num_threads, bit_exact, workspace: Arc::default(), cache: PhantomData }
    }
}

impl<E: Element> Operator for PagedAttention<E> {
    type Kernel<'a> = PagedAttentionKernel<E>;

    fn name(&self) -> &str {
        "PagedAttention"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        INPUTS.map(|(_, ty, presence)| match presence {
            Presence::Required if ty == TensorElementType::Undefined => OperatorInput::required(E::TYPE),
            Presence::Required => OperatorInput::required(ty),
            Presence::Optional | Presence::Refused => OperatorInput::optional(ty),
        })
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn infer_shape(&self, ctx: &mut ShapeInferenceContext) -> ort::Result<()> {
        // What is missing is refused when the kernel is made: ONNX Runtime never frees an error from here.
        let (Ok(heads), Ok(kv_heads)) = (ctx.attr::<i64>("num_heads"), ctx.attr::<i64>("kv_num_heads"))
        else {
            return Ok(());
        };
        let inputs = ctx.inputs();
        let Some(ValueType::Tensor { ty, shape, dimension_symbols }) = inputs.first() else {
            return Ok(());
        };
        let parts = heads.saturating_add(kv_heads.saturating_mul(2));
        // An unknown shape is left to the run; a wrong one too, where it is an error with a name.
        if let [tokens, width] = **shape
            && width > 0
            && parts > 0
        {
            let output = ValueType::Tensor {
                ty: *ty,
                shape: Shape::new([tokens, (width / parts).saturating_mul(heads)]),
                dimension_symbols: dimension_symbols.clone(),
            };
            ctx.set_output(0, &output)?;
        }
        Ok(())
    }

    fn create_kernel<'a>(&self, ctx: &KernelContext<'a>) -> ort::Result<PagedAttentionKernel<E>> {
        let attributes = Attributes::check(&Node(ctx)).map_err(error)?;
        let simd = Simd::choose(isa::forced().as_deref()).map_err(error)?;
        Ok(PagedAttentionKernel {
            attributes,
            simd,
            num_threads: self.num_threads,
            bit_exact: self.bit_exact,
            workspace: Arc::clone(&self.workspace),
            cache: PhantomData,
        })
    }
}

/// A node's attributes.
struct Node<'a, 'b>(&'a KernelContext<'b>);

impl Source for Node<'_, '_> {
    fn int(&self, name: &str) -> Option<i64> {
        self.0.get(name)
    }
    fn float(&self, name: &str) -> Option<f32> {
        self.0.get(name)
    }
    fn string(&self, name: &str) -> Option<String> {
        self.0.get(name)
    }
}

/// The kernel of one node.
struct PagedAttentionKernel<E> {
    attributes: Attributes,
    simd: Simd,
    num_threads: usize,
    bit_exact: bool,
    workspace: Arc<Mutex<Workspace>>,
    cache: PhantomData<E>,
}

impl<E: Element> Kernel for PagedAttentionKernel<E> {
    fn compute(&mut self, ctx: &ComputeContext) -> ort::Result<()> {
        catch_unwind(AssertUnwindSafe(|| self.attend(ctx)))
            .unwrap_or_else(|_| Err(error("the kernel panicked".into())))
    }
}

impl<E: Element> PagedAttentionKernel<E> {
    fn attend(&self, ctx: &ComputeContext) -> ort::Result<()> {
        let values = Values::read(ctx)?;
        let (key_cache, value_cache) = (values.required(3)?, values.required(4)?);
        let inputs = Inputs {
            query: tensor(values.required(0)?)?,
            cumulative_sequence_length: tensor(values.required(5)?)?,
            past_seqlens: tensor(values.required(6)?)?,
            block_table: tensor(values.required(7)?)?,
            cos_cache: values.optional(8).map(tensor).transpose()?,
            sin_cache: values.optional(9).map(tensor).transpose()?,
            slot_mapping: values.optional(10).map(tensor).transpose()?,
        };
        let batch =
            Batch::check(&self.attributes, &inputs, key_cache.shape(), value_cache.shape()).map_err(error)?;
        let geometry = batch.geometry;
        let shape = [batch.num_tokens as i64, geometry.output_width() as i64];
        let mut output = ctx.output(0, shape)?.ok_or_else(|| error("output: is not wanted".into()))?;
        if batch.num_tokens == 0 {
            return Ok(());
        }
        let (_, output) = output.try_extract_tensor_mut::<f32>()?;
        let in_tiles = !self.bit_exact && self.simd.wants_tiles::<E>(&geometry);
        let (key_cache, value_cache) = (elements::<E>(key_cache)?, elements(value_cache)?);
        if key_cache == value_cache {
            return Err(error("key_cache and value_cache are one tensor, and there must be two".into()));
        }
        // SAFETY: the contract of the operator is that both caches are updated in place, each slot by one token
        // at most. So the caller gives two tensors of this shape, which nobody else uses during the run. The
        // instruction set, and with it the order, is one for all calls.
        let cache = unsafe { KvCache::new(key_cache, value_cache, geometry, in_tiles) };
        let scale = self.attributes.scale;
        let threads = SessionThreads { ctx, num_threads: self.num_threads };
        let scale = scale.unwrap_or(1.0 / (geometry.head_dim as f32).sqrt());
        with_workspace(&self.workspace, |workspace| {
            call::run(self.simd, &batch, cache, scale, output, workspace, &threads)
        })
        .map_err(error)
    }
}

/// A call's inputs as ONNX Runtime holds them.
struct Values<'a>([Option<ValueRef<'a, DynTensorValueType>>; 17]);

impl<'a> Values<'a> {
    fn read(ctx: &'a ComputeContext) -> ort::Result<Self> {
        let mut values = [const { None }; 17];
        let num_inputs = ctx.num_inputs()?.min(INPUTS.len());
        for (i, value) in values.iter_mut().enumerate().take(num_inputs) {
            *value = ctx.input(i)?.map(ValueRef::downcast).transpose()?;
            if INPUTS[i].2 == Presence::Refused && value.is_some() {
                return Err(error(format!("{}: is not supported by this kernel", INPUTS[i].0)));
            }
        }
        Ok(Self(values))
    }

    fn optional(&self, i: usize) -> Option<&ValueRef<'a, DynTensorValueType>> {
        self.0[i].as_ref()
    }

    fn required(&self, i: usize) -> ort::Result<&ValueRef<'a, DynTensorValueType>> {
        self.optional(i).ok_or_else(|| error(format!("{}: is absent", INPUTS[i].0)))
    }
}

fn tensor<'a, T: PrimitiveTensorElementType>(
    value: &'a ValueRef<'_, DynTensorValueType>,
) -> ort::Result<Tensor<'a, T>> {
    let (shape, data) = value.try_extract_tensor::<T>()?;
    Ok(Tensor { shape, data })
}

/// Where a cache starts.
fn elements<E: Element>(value: &ValueRef<'_, DynTensorValueType>) -> ort::Result<*mut E> {
    // The type was declared with the operator; extracting checks it nonetheless.
    value.try_extract_tensor::<E>()?;
    Ok(value.data_ptr().cast_mut().cast())
}

fn error(message: String) -> ort::Error {
    ort::Error::new(format!("PagedAttention: {message}"))
}
