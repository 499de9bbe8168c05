//! Owns how a graph is to be run.

use std::path::PathBuf;

/// How to run a graph.
#[derive(Debug, Clone)]
pub struct OrtOptions {
    /// The ONNX Runtime shared library.
    pub library: PathBuf,
    /// Threads of the session, the engine's own thread included.
    pub num_threads: usize,
    /// Most bytes the KV cache may take.
    pub kv_cache_bytes: usize,
    /// Which GPU, if not the first; for graphs of the CUDA provider.
    pub device_id: Option<i32>,
    /// Most bytes of the GPU's memory, cache and weights included; for graphs of the CUDA provider.
    pub device_memory_bytes: Option<usize>,
    /// Whether decode steps are not to be captured as CUDA graphs; for graphs of the CUDA provider.
    pub enforce_eager: bool,
    /// Whether every instruction set has to give the same bits, which excludes AMX from attention; for graphs of
    /// the CPU provider with the engine's own products.
    pub bit_exact: bool,
}
