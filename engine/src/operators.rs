//! Owns the operators that this engine adds to ONNX Runtime's CPU provider.
//!
//! Invariant: PagedAttention's name and contract are ONNX Runtime's own (`com.microsoft`), so one graph
//! contract serves both providers; what only the CPU has lies in a domain of our own. Register them in
//! CPU sessions only: in a CUDA session they would shadow the provider's own kernel.

mod large_pages;
mod paged_attention;
mod parallel;
mod quantized_matmul;
#[cfg(test)]
mod testing;

use ort::operator::OperatorDomain;
use ort::session::builder::SessionBuilder;

/// The domain of ONNX Runtime's contributed operators.
pub const DOMAIN: &str = "com.microsoft";

/// The domain of this engine's own operators.
pub const OWN_DOMAIN: &str = "glmserve";

/// Variable that forces an instruction set: `portable`, `avx2`, `avxvnni`, `avx512` or `amx`.
pub const SIMD_VARIABLE: &str = "GLMSERVE_SIMD";

/// Adds the operators of CPU sessions. `num_threads` is how many intra-op threads the session has, 0 for
/// one a core: it guides how work is cut up and never changes a result.
///
/// # Errors
/// When ONNX Runtime refuses a domain.
pub fn register(builder: SessionBuilder, num_threads: usize) -> ort::Result<SessionBuilder> {
    let matmul = quantized_matmul::QuantizedMatMul::new(num_threads);
    Ok(builder
        .with_operators(paged_attention::add_to(OperatorDomain::new(DOMAIN)?, num_threads)?)?
        .with_operators(OperatorDomain::new(OWN_DOMAIN)?.add(matmul)?)?)
}

/// The instruction set that [`SIMD_VARIABLE`] names.
fn forced_simd() -> Option<String> {
    std::env::var(SIMD_VARIABLE).ok().filter(|name| !name.is_empty())
}
