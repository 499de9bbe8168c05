//! Owns the operator `PostAttention` of the domain `glmserve`: all that lies between a layer's attention and
//! the next one's, in one node, so that at few rows no time goes between nodes.
//!
//! ```text
//! inputs      attention float32 [T, K]; residual float32 [T, hidden];
//!             dense uint8, packed [hidden, K]; post_norm float32 [hidden]; gate_up uint8, [2 ffn, hidden];
//!             down uint8, [hidden, ffn]; next_norm float32 [hidden]; next uint8, [N, hidden];
//!             next_bias float32 [panels, 32], optional
//! outputs     next float32 [T, N]; residual float32 [T, hidden]
//! attributes  K, hidden, ffn, N, bits, epsilon; dense_block_size, gate_up_block_size, down_block_size,
//!             next_block_size
//!
//! middle   = residual + attention * dense
//! residual = middle + swiglu(norm(middle) * gate_up) * down
//! next     = norm(residual) * next + next_bias
//! ```
//!
//! Products, packing and bias are QuantizedMatMul's, gate_up's with its epilogue swiglu. Weights are constants:
//! they are read, and copied to large pages, when the kernel is made.
//!
//! Invariant: QuantizedMatMul's, for the whole of it: a row depends on that row and the weights only.

use std::array::from_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::{DynTensorValueType, PrimitiveTensorElementType, Shape, TensorElementType, ValueType};

use super::activations::Activations;
use super::inputs::input;
use super::multiply::{Call, Rows};
use super::norm::Norm;
use super::packing::{COLUMNS, Format, LINE};
use super::product::{Product, size};
use super::simd::Simd;
use crate::isa;
use crate::large_pages::{Copied, LargePages};
use crate::parallel::{SessionThreads, threads_of_session, with_workspace};

/// The products in order, and which input holds the weights of each.
const PRODUCTS: [(&str, usize); 4] = [("dense", 2), ("gate_up", 4), ("down", 5), ("next", 7)];
const NORMS: [(&str, usize); 2] = [("post_norm", 3), ("next_norm", 6)];
const BIAS: usize = 8;

/// The operator. Its kernels run one after the other and share memory.
pub(in super::super) struct PostAttention {
    num_threads: usize,
    workspace: Arc<Mutex<Workspace>>,
    pages: Arc<LargePages>,
}

/// What is computed on the way, kept between calls: memory only grows.
#[derive(Default)]
struct Workspace {
    activations: Activations,
    /// `[T, hidden]`
    middle: Vec<f32>,
    /// `[T, ffn]`
    gated: Vec<f32>,
}

impl PostAttention {
    /// The operator for sessions of `num_threads` threads; 0 is one a core.
    pub(in super::super) fn new(num_threads: usize) -> Self {
        let num_threads = threads_of_session(num_threads);
        Self { num_threads, workspace: Arc::default(), pages: Arc::default() }
    }
}

impl Operator for PostAttention {
    type Kernel<'a> = PostAttentionKernel;

    fn name(&self) -> &str {
        "PostAttention"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        use TensorElementType::{Float32, Uint8};
        let required = [Float32, Float32, Uint8, Float32, Uint8, Uint8, Float32, Uint8];
        let required = required.map(OperatorInput::required);
        required.into_iter().chain([OperatorInput::optional(Float32)])
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [(); 2].map(|()| OperatorOutput::required(TensorElementType::Float32))
    }

    fn infer_shape(&self, ctx: &mut ShapeInferenceContext) -> ort::Result<()> {
        // What is wrong is refused when the kernel is made: ONNX Runtime never frees an error from here.
        let (Ok(next), Ok(hidden)) = (ctx.attr::<i64>("N"), ctx.attr::<i64>("hidden")) else {
            return Ok(());
        };
        let inputs = ctx.inputs();
        let Some(ValueType::Tensor { ty, shape, dimension_symbols }) = inputs.first() else {
            return Ok(());
        };
        if let [rows, _] = **shape {
            for (i, width) in [next, hidden].into_iter().enumerate() {
                let (shape, dimension_symbols) = (Shape::new([rows, width]), dimension_symbols.clone());
                ctx.set_output(i, &ValueType::Tensor { ty: *ty, shape, dimension_symbols })?;
            }
        }
        Ok(())
    }

    fn create_kernel<'a>(&self, ctx: &KernelContext<'a>) -> ort::Result<PostAttentionKernel> {
        let products = products(|name| ctx.get(name)).map_err(error)?;
        let epsilon = ctx.get("epsilon").ok_or_else(|| error("epsilon is missing".into()))?;
        let simd = Simd::choose(isa::forced().as_deref()).map_err(error)?;
        let mut weights = vec![];
        for ((name, i), product) in PRODUCTS.into_iter().zip(products) {
            let shape = [product.num_panels(), product.panel_bytes()];
            let copy = constant(ctx, name, i, &shape, |bytes| Copied::new(&self.pages, bytes))?;
            weights.push(copy.ok_or_else(|| error(format!("{name}: no memory for a copy")))?);
        }
        let norm = |i: usize| constant(ctx, NORMS[i].0, NORMS[i].1, &[products[3].k], <[f32]>::to_vec);
        let has_bias = ctx.inputs()?.len() > BIAS;
        let shape = [products[3].num_panels(), COLUMNS];
        let bias = has_bias.then(|| constant(ctx, "next_bias", BIAS, &shape, <[f32]>::to_vec)).transpose()?;
        Ok(PostAttentionKernel {
            products,
            epsilon,
            weights: weights.try_into().map_err(|_| error("products: are not four".into()))?,
            norms: [norm(0)?, norm(1)?],
            bias,
            simd,
            num_threads: self.num_threads,
            workspace: Arc::clone(&self.workspace),
        })
    }
}

/// Reads a node's attributes: `int` finds one by its name.
fn products(int: impl Fn(&str) -> Option<i64>) -> Result<[Product; 4], String> {
    let size = |name: &str| size(&int, name);
    let (k, hidden, ffn, next) = (size("K")?, size("hidden")?, size("ffn")?, size("N")?);
    let bits = size("bits")?;
    let sizes = [(k, hidden), (hidden, 2 * ffn), (ffn, hidden), (hidden, next)];
    let mut products = vec![];
    for ((name, _), (k, n)) in PRODUCTS.into_iter().zip(sizes) {
        let block_size = size(&format!("{name}_block_size"))?;
        let product = Product::new(k, n, Format { bits, block_size }, name == "gate_up");
        products.push(product.map_err(|message| format!("{name}: {message}"))?);
    }
    Ok(from_fn(|i| products[i]))
}

/// The kernel of one node.
pub(in super::super) struct PostAttentionKernel {
    products: [Product; 4],
    epsilon: f32,
    weights: [Copied; 4],
    norms: [Vec<f32>; 2],
    bias: Option<Vec<f32>>,
    simd: Simd,
    num_threads: usize,
    workspace: Arc<Mutex<Workspace>>,
}

impl Kernel for PostAttentionKernel {
    fn compute(&mut self, ctx: &ComputeContext) -> ort::Result<()> {
        catch_unwind(AssertUnwindSafe(|| self.run(ctx)))
            .unwrap_or_else(|_| Err(error("the kernel panicked".into())))
    }
}

impl PostAttentionKernel {
    fn run(&self, ctx: &ComputeContext) -> ort::Result<()> {
        let [dense, _, down, next] = self.products;
        let absent = |name: &str| error(format!("{name}: is absent"));
        let attention = input(ctx, 0)?.ok_or_else(|| absent("attention"))?;
        let residual = input(ctx, 1)?.ok_or_else(|| absent("residual"))?;
        let (shape, attention) = attention.try_extract_tensor::<f32>()?;
        let rows = match **shape {
            [rows, width] if width as usize == dense.k => rows,
            _ => return Err(error(format!("attention: shape {shape:?} is not [rows, {}]", dense.k))),
        };
        let (shape, residual) = residual.try_extract_tensor::<f32>()?;
        if **shape != [rows, dense.n as i64] {
            return Err(error(format!("residual: shape {shape:?} is not [{rows}, {}]", dense.n)));
        }
        let absent = || error("an output: is not wanted".into());
        let mut projected = ctx.output(0, [rows, next.n as i64])?.ok_or_else(absent)?;
        let mut updated = ctx.output(1, [rows, down.n as i64])?.ok_or_else(absent)?;
        if rows == 0 {
            return Ok(());
        }
        let (_, projected) = projected.try_extract_tensor_mut::<f32>()?;
        let (_, updated) = updated.try_extract_tensor_mut::<f32>()?;
        let threads = SessionThreads { ctx, num_threads: self.num_threads };
        with_workspace(&self.workspace, |Workspace { activations, middle, gated }| {
            let (middle, gated) = (aligned(middle, residual.len()), aligned(gated, rows as usize * down.k));
            let [attention, residual] = [attention, residual].map(Rows::read);
            let [middle, gated, updated, projected] = [middle, gated, updated, projected].map(Rows::write);
            let norm = |i: usize| Some(Norm { weight: &self.norms[i], epsilon: self.epsilon });
            let call = |i: usize, x, norm, addend, output| {
                let (product, weights) = (self.products[i], &*self.weights[i]);
                Call { product, x, norm, weights, bias: None, addend, output }
            };
            let calls = [
                call(0, attention, None, Some(residual), middle),
                call(1, middle, norm(0), None, gated),
                call(2, gated, None, Some(middle), updated),
                Call { bias: self.bias.as_deref(), ..call(3, updated, norm(1), None, projected) },
            ];
            self.simd.run(&calls, activations, &threads)
        })
        .map_err(error)
    }
}

/// Room for `len` values from the start of a line on: else what two panels write would share lines.
fn aligned(values: &mut Vec<f32>, len: usize) -> &mut [f32] {
    values.resize(values.len().max(len + LINE / size_of::<f32>()), 0.0);
    let start = values.as_ptr().align_offset(LINE);
    &mut values[start..start + len]
}

/// What `take` makes of input `i`, an initialiser.
fn constant<T: PrimitiveTensorElementType, R>(
    ctx: &KernelContext,
    name: &str,
    i: usize,
    wanted: &[usize],
    take: impl FnOnce(&[T]) -> R,
) -> ort::Result<R> {
    let value = ctx.constant_input::<DynTensorValueType>(i);
    let value = value.map_err(|_| error(format!("{name}: is not a constant")))?;
    let (shape, values) = value.try_extract_tensor::<T>()?;
    if !shape.iter().map(|&size| size as usize).eq(wanted.iter().copied()) {
        return Err(error(format!("{name}: shape {shape:?} is not {wanted:?}")));
    }
    Ok(take(values))
}

fn error(message: String) -> ort::Error {
    ort::Error::new(format!("PostAttention: {message}"))
}
