//! Owns how a graph is to be run.

use std::path::PathBuf;

use super::cuda::buckets::MAX_ROWS;
use crate::error::LoadError;
use crate::model::manifest::{Graph, Kernel, Provider};

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

    /// Refuses options that a graph's provider would take no notice of, promises that its kernels do not keep, and an
    /// instruction set that this CPU does not have. Nothing is loaded for it.
    ///
    /// # Errors
    /// [`LoadError::Config`] names the first.
    pub fn check(&self, graph: &Graph) -> Result<(), LoadError> {
        if graph.provider == Provider::Cpu {
            glm_kernels::check_instruction_set().map_err(LoadError::Config)?;
        }
        self.check_for(graph.provider, graph.kernel)
    }

    fn check_for(&self, provider: Provider, kernel: Kernel) -> Result<(), LoadError> {
        if self.bit_exact && kernel != Kernel::Glmserve {
            return Err(LoadError::Config(
                "--bit-exact is for graphs with the engine's own products (exported with --precision int4 or int8 for \
                 the CPU, and --kernel glmserve); the products of this one are ONNX Runtime's, whose bits depend on the \
                 processor"
                    .into(),
            ));
        }
        let of_cuda = [
            ("--device", self.device_id.is_some()),
            ("--gpu-memory", self.device_memory_bytes.is_some()),
            ("--enforce-eager", self.enforce_eager),
            ("--gpu-memory-utilization", matches!(self.kv_cache, KvCacheMemory::Utilization(_))),
        ];
        let is_shared_out = matches!(self.kv_cache, KvCacheMemory::Utilization(_));
        if provider == Provider::Cuda && is_shared_out && self.device_memory_bytes.is_some() {
            return Err(LoadError::Config(
                "--gpu-memory needs --kv-cache-memory: without it the cache takes what the whole GPU has left, up to \
                 --gpu-memory-utilization"
                    .into(),
            ));
        }
        if provider == Provider::Cuda && !self.enforce_eager && self.max_num_seqs > MAX_ROWS {
            return Err(LoadError::Config(format!(
                "--max-num-seqs {}: CUDA graphs hold up to {MAX_ROWS} sequences; choose no more, or --enforce-eager",
                self.max_num_seqs
            )));
        }
        match of_cuda.iter().find(|(_, is_given)| *is_given) {
            Some((name, _)) if provider == Provider::Cpu => Err(LoadError::Config(format!(
                "{name} is for graphs of the CUDA provider, this one is the CPU's"
            ))),
            _ => Ok(()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_a_graph_cannot_honour_are_refused_by_name() {
        let none = OrtOptions::new("no/such/library".into(), 1, 1);
        assert!(none.check_for(Provider::Cpu, Kernel::Ort).is_ok());
        for (name, options) in [
            // The very device that is the default: what is given is meant.
            ("--device ", OrtOptions { device_id: Some(0), ..none.clone() }),
            ("--gpu-memory ", OrtOptions { device_memory_bytes: Some(1), ..none.clone() }),
            ("--enforce-eager ", OrtOptions { enforce_eager: true, ..none.clone() }),
            (
                "--gpu-memory-utilization ",
                OrtOptions { kv_cache: KvCacheMemory::Utilization(0.9), ..none.clone() },
            ),
        ] {
            let error = options.check_for(Provider::Cpu, Kernel::Glmserve).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
            assert!(options.check_for(Provider::Cuda, Kernel::Ort).is_ok());
        }
        let shared_out = OrtOptions {
            kv_cache: KvCacheMemory::Utilization(0.9),
            device_memory_bytes: Some(1),
            ..none.clone()
        };
        for (options, words) in [
            (shared_out, "--gpu-memory needs --kv-cache-memory"),
            (
                OrtOptions { max_num_seqs: 513, ..none.clone() },
                "--max-num-seqs 513: CUDA graphs hold up to 512",
            ),
        ] {
            let error = options.check_for(Provider::Cuda, Kernel::Ort).unwrap_err().to_string();
            assert!(error.starts_with(words), "{error}");
        }
        let eager = OrtOptions { max_num_seqs: 513, enforce_eager: true, ..none.clone() };
        assert!(eager.check_for(Provider::Cuda, Kernel::Ort).is_ok());
        let exact = OrtOptions { bit_exact: true, ..none };
        assert!(exact.check_for(Provider::Cpu, Kernel::Glmserve).is_ok());
        for provider in [Provider::Cpu, Provider::Cuda] {
            let error = exact.check_for(provider, Kernel::Ort).unwrap_err().to_string();
            assert!(error.starts_with("--bit-exact "), "{error}");
        }
    }
}
