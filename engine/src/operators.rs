//! Owns the operators that this engine adds to ONNX Runtime's CPU provider.
//!
//! Invariant: names and contracts are ONNX Runtime's own (`com.microsoft`), so one graph contract
//! serves both providers. Register the domain in CPU sessions only: in a CUDA session it would
//! shadow the provider's own kernel.

mod paged_attention;

use ort::operator::OperatorDomain;

/// The domain of ONNX Runtime's contributed operators.
pub const DOMAIN: &str = "com.microsoft";

/// Variable that forces an instruction set: `portable`, `avx2` or `avx512`.
pub const SIMD_VARIABLE: &str = "GLMSERVE_SIMD";

/// The operators of CPU sessions, for `SessionBuilder::with_operators`. One domain may serve many
/// sessions; its kernels share their scratch memory.
///
/// # Errors
/// When ONNX Runtime refuses the domain.
pub fn domain() -> ort::Result<OperatorDomain> {
    OperatorDomain::new(DOMAIN)?.add(paged_attention::PagedAttention::default())
}
