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
/// sessions; its kernels share their scratch memory. `num_threads` is how many intra-op threads the
/// sessions have, 0 for one a core: it guides how work is cut up and never changes a result.
///
/// # Errors
/// When ONNX Runtime refuses the domain.
pub fn domain(num_threads: usize) -> ort::Result<OperatorDomain> {
    paged_attention::add_to(OperatorDomain::new(DOMAIN)?, num_threads)
}
