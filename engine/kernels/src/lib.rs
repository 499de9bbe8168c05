//! Owns the operators that the engine adds to ONNX Runtime's CPU provider.
//!
//! Invariant: PagedAttention's name and contract are ONNX Runtime's own (`com.microsoft`), so one graph
//! contract serves both providers; what only the CPU has lies in a domain of our own. Only CPU sessions
//! have them: in a CUDA session they would shadow the provider's own kernel.

#[cfg(target_arch = "x86_64")]
mod amx;
mod isa;
mod large_pages;
mod math;
mod paged_attention;
mod parallel;
mod quantized_matmul;
#[cfg(test)]
mod testing;

use std::sync::{Mutex, PoisonError};

use ort::operator::OperatorDomain;
use ort::session::Session;
use ort::session::builder::SessionBuilder;

pub use isa::SIMD_VARIABLE;

/// Whether this CPU has the instruction set that [`SIMD_VARIABLE`] names, if it names one.
///
/// # Errors
/// It does not, or there is no such name.
pub fn check_instruction_set() -> Result<(), String> {
    paged_attention::check_forced()?;
    quantized_matmul::check_forced()
}

/// The domain of ONNX Runtime's contributed operators.
pub const DOMAIN: &str = "com.microsoft";

/// The domain of the operators that only this crate has.
pub const OWN_DOMAIN: &str = "glmserve";

/// Makes a CPU session that has the operators; `commit` says of what graph. `num_threads` is how many
/// intra-op threads the session has, 0 for one a core: it guides how work is cut up and never changes a
/// result. With `bit_exact` all instruction sets give the same bits: attention does without AMX, whose products of
/// bfloat16 round otherwise. (Its products of whole numbers are exact, so the matrix product keeps them.)
///
/// # Errors
/// When ONNX Runtime refuses a domain or the graph.
pub fn session(
    builder: SessionBuilder,
    num_threads: usize,
    bit_exact: bool,
    commit: impl FnOnce(SessionBuilder) -> ort::Result<Session>,
) -> ort::Result<Session> {
    // ONNX Runtime looks whether the process knows a domain and adds it, two steps that it does not keep
    // together: of two sessions made at once, one could be refused because the domain "already exists".
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let matmul = quantized_matmul::QuantizedMatMul::new(num_threads);
    let post_attention = quantized_matmul::PostAttention::new(num_threads);
    let attention = paged_attention::add_to(OperatorDomain::new(DOMAIN)?, num_threads, bit_exact)?;
    let builder = builder
        .with_operators(attention)?
        .with_operators(OperatorDomain::new(OWN_DOMAIN)?.add(matmul)?.add(post_attention)?)?;
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    commit(builder)
}
