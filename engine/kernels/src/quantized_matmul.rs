//! Owns the operator `QuantizedMatMul` of the domain `glmserve`: rows of float32 times a packed matrix
//! of 4 or 8 bits.
//!
//! ```text
//! inputs      x float32 [T, K]; weights uint8 [panels, panel bytes], see `packing`;
//!             bias float32 [panels, 32], optional, in the order of the packed columns;
//!             norm float32 [K], optional: the weight of an RMSNorm of x, which comes first
//! output      float32 [T, N]; with the epilogue swiglu [T, N / 2]: silu(first half) * second half
//! attributes  K, N, bits (4, 8), block_size (32 to 512, a power of 2; divides K), epilogue (none, swiglu);
//!             epsilon, with norm only
//! ```
//!
//! Rows become int8 with a scale for each row and block of K.
//!
//! Invariant: a row of the output depends, to the last bit, on that row and the weights only: not on
//! the rows beside it, the number of threads or the instruction set. And no panic crosses into ONNX
//! Runtime: bad inputs are errors that name the input.

mod activations;
mod finish;
mod inputs;
mod kernel;
mod level;
mod multiply;
mod norm;
mod packing;
mod post_attention;
mod product;
mod simd;
#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock};

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::{Shape, TensorElementType, ValueType};

use crate::isa;
use crate::large_pages::{Copied, LargePages};
use crate::parallel::{SessionThreads, threads_of_session, with_workspace};
use activations::Activations;
use inputs::input;
use multiply::{Call, Rows};
use norm::Norm;
use packing::COLUMNS;
use product::Product;
use simd::Simd;

/// Whether the instruction set that the environment names is one that this CPU has.
///
/// # Errors
/// As [`isa::choose`].
pub(crate) fn check_forced() -> Result<(), String> {
    Simd::choose(isa::forced().as_deref()).map(drop)
}

pub(super) use post_attention::PostAttention;

/// The operator. Its kernels run one after the other and share memory for quantised rows.
pub(super) struct QuantizedMatMul {
    num_threads: usize,
    workspace: Arc<Mutex<Activations>>,
    pages: Arc<LargePages>,
}

impl QuantizedMatMul {
    /// The operator for sessions of `num_threads` threads; 0 is one a core.
    pub(super) fn new(num_threads: usize) -> Self {
        let num_threads = threads_of_session(num_threads);
        Self { num_threads, workspace: Arc::default(), pages: Arc::default() }
    }
}

impl Operator for QuantizedMatMul {
    type Kernel<'a> = QuantizedMatMulKernel;

    fn name(&self) -> &str {
        "QuantizedMatMul"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::required(TensorElementType::Uint8),
            OperatorInput::optional(TensorElementType::Float32),
            OperatorInput::optional(TensorElementType::Float32),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn infer_shape(&self, ctx: &mut ShapeInferenceContext) -> ort::Result<()> {
        // What is wrong is refused when the kernel is made: ONNX Runtime never frees an error from here.
        let Ok(product) = Product::check(|name| ctx.attr(name).ok(), |name| ctx.attr(name).ok()) else {
            return Ok(());
        };
        let inputs = ctx.inputs();
        let Some(ValueType::Tensor { ty, shape, dimension_symbols }) = inputs.first() else {
            return Ok(());
        };
        // An unknown shape is left to the run; a wrong one too, where it is an error with a name.
        if let [rows, _] = **shape {
            let output = ValueType::Tensor {
                ty: *ty,
                shape: Shape::new([rows, product.width() as i64]),
                dimension_symbols: dimension_symbols.clone(),
            };
            ctx.set_output(0, &output)?;
        }
        Ok(())
    }

    fn create_kernel<'a>(&self, ctx: &KernelContext<'a>) -> ort::Result<QuantizedMatMulKernel> {
        let product = Product::check(|name| ctx.get(name), |name| ctx.get(name)).map_err(error)?;
        let simd = Simd::choose(isa::forced().as_deref()).map_err(error)?;
        Ok(QuantizedMatMulKernel {
            product,
            epsilon: ctx.get("epsilon"),
            simd,
            num_threads: self.num_threads,
            workspace: Arc::clone(&self.workspace),
            pages: Arc::clone(&self.pages),
            weights: OnceLock::new(),
        })
    }
}

/// The kernel of one node.
pub(super) struct QuantizedMatMulKernel {
    product: Product,
    epsilon: Option<f32>,
    simd: Simd,
    num_threads: usize,
    workspace: Arc<Mutex<Activations>>,
    pages: Arc<LargePages>,
    /// A copy of the weights, which never change; none where there was no memory for it.
    weights: OnceLock<Option<Copied>>,
}

impl Kernel for QuantizedMatMulKernel {
    fn compute(&mut self, ctx: &ComputeContext) -> ort::Result<()> {
        catch_unwind(AssertUnwindSafe(|| self.multiply(ctx)))
            .unwrap_or_else(|_| Err(error("the kernel panicked".into())))
    }
}

impl QuantizedMatMulKernel {
    fn multiply(&self, ctx: &ComputeContext) -> ort::Result<()> {
        let product = self.product;
        let (x, weights, bias, norm) = (input(ctx, 0)?, input(ctx, 1)?, input(ctx, 2)?, input(ctx, 3)?);
        let absent = |name: &str| error(format!("{name}: is absent"));
        let x = x.ok_or_else(|| absent("x"))?;
        let weights = weights.ok_or_else(|| absent("weights"))?;
        let (shape, x) = x.try_extract_tensor::<f32>()?;
        let rows = match **shape {
            [rows, width] if width as usize == product.k => rows,
            _ => return Err(error(format!("x: shape {shape:?} is not [rows, {}]", product.k))),
        };
        let (shape, weights) = weights.try_extract_tensor::<u8>()?;
        check_shape("weights", shape, [product.num_panels(), product.panel_bytes()])?;
        let copy = self.weights.get_or_init(|| Copied::new(&self.pages, weights));
        let weights = copy.as_deref().unwrap_or(weights);
        let bias = match &bias {
            None => None,
            Some(bias) => {
                let (shape, bias) = bias.try_extract_tensor::<f32>()?;
                check_shape("bias", shape, [product.num_panels(), COLUMNS])?;
                Some(bias)
            }
        };
        let norm = match (&norm, self.epsilon) {
            (None, None) => None,
            (Some(norm), Some(epsilon)) => {
                let (shape, weight) = norm.try_extract_tensor::<f32>()?;
                if **shape != [product.k as i64] {
                    return Err(error(format!("norm: shape {shape:?} is not [{}]", product.k)));
                }
                Some(Norm { weight, epsilon })
            }
            (Some(_), None) => return Err(error("epsilon is missing, which the input norm needs".into())),
            (None, Some(_)) => return Err(error("norm: is absent, but there is epsilon".into())),
        };
        let output = ctx.output(0, [rows, product.width() as i64])?;
        let mut output = output.ok_or_else(|| error("output: is not wanted".into()))?;
        if rows == 0 {
            return Ok(());
        }
        let (_, output) = output.try_extract_tensor_mut::<f32>()?;
        let threads = SessionThreads { ctx, num_threads: self.num_threads };
        let (x, output) = (Rows::read(x), Rows::write(output));
        let call = Call { product, x, norm, weights, bias, addend: None, output };
        with_workspace(&self.workspace, |activations| self.simd.run(&[call], activations, &threads))
            .map_err(error)
    }
}

fn check_shape(name: &str, shape: &Shape, wanted: [usize; 2]) -> ort::Result<()> {
    match **shape {
        [first, second] if [first as usize, second as usize] == wanted => Ok(()),
        _ => Err(error(format!("{name}: shape {shape:?} is not {wanted:?}"))),
    }
}

fn error(message: String) -> ort::Error {
    ort::Error::new(format!("QuantizedMatMul: {message}"))
}
