//! Owns how a graph is to be run.

use std::path::PathBuf;

/// How to run a graph.
#[derive(Debug, Clone)]
pub struct OrtOptions {
    /// The ONNX Runtime shared library.
    pub library: PathBuf,
    /// Threads of the session, the engine's own thread included.
    pub num_threads: usize,
    /// How much the KV cache may take.
    pub kv_cache: KvCacheMemory,
    /// Most sequences of a step. On a GPU, memory is set aside for the largest step.
    pub max_num_seqs: usize,
    /// Most tokens of a step.
    pub max_num_batched_tokens: usize,
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

impl OrtOptions {
    /// Steps of one sequence, and the defaults of everything else.
    pub fn new(library: PathBuf, num_threads: usize, kv_cache_bytes: usize) -> Self {
        Self {
            library,
            num_threads,
            kv_cache: KvCacheMemory::Bytes(kv_cache_bytes),
            max_num_seqs: 1,
            max_num_batched_tokens: 512,
            device_id: None,
            device_memory_bytes: None,
            enforce_eager: false,
            bit_exact: false,
        }
    }
}

/// How much memory the KV cache may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum KvCacheMemory {
    /// So many bytes.
    Bytes(usize),
    /// What the GPU has left of this part of its memory beside the weights and the largest steps.
    Utilization(f64),
}
