//! Owns what differs between providers: the session's options, and the memory of caches and outputs.
//!
//! Invariant: in a CUDA session nothing falls back to the CPU, and the engine's own operators are not
//! registered: they would take the place of the provider's.

use std::path::Path;

use half::bf16;
use half::vec::HalfBitsVecExt;
use ndarray::{Array1, Array4, ShapeError, s};
use ort::environment::Environment;
use ort::ep::{ArbitrarilyConfigurableExecutionProvider, ArenaExtendStrategy, CUDA};
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::{DynTensor, Tensor, TensorElementType};

use super::cuda::runtime::CudaStream;
use super::device_error::{is_permanent, runtime};
use super::options::OrtOptions;
use crate::error::LoadError;
use crate::model::manifest::{Dtype, Geometry, Graph, Provider};
use crate::runner::KvCacheLayout;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Flash, memory-efficient, unfused and paged decode attention, by the library's bits (1.31.1, `AttentionBackend`).
/// Not cuDNN's, which on Hopper is its first choice for decodes: it compiles for half a second at each new number of
/// sequences. Captured steps have few of those, all seen before the first request.
const ATTENTION_WITHOUT_CUDNN: i32 = 1 | 2 | 16 | 512;

/// Where a session's tensors lie.
#[derive(Debug, Clone)]
pub(super) enum Device {
    /// In memory of the host.
    Cpu,
    /// On a GPU, whose kernels and copies are in the order of a stream.
    Cuda {
        id: i32,
        /// As NVIDIA's tools write it.
        uuid: String,
        stream: CudaStream,
    },
}

impl Device {
    /// The device of a provider, which is loaded.
    ///
    /// # Errors
    /// [`LoadError`] in clear words where the provider can't be loaded.
    pub(super) fn open(
        environment: &Environment,
        provider: Provider,
        options: &OrtOptions,
    ) -> Result<Self, LoadError> {
        let open = |id| {
            // The library loads a provider when a session is to have it, and CUDA's runtime with it.
            let provider = CUDA::default().with_device_id(id).build().error_on_failure();
            drop(Session::builder(environment)?.with_execution_providers([provider])?);
            CudaStream::open(id)
        };
        if provider == Provider::Cpu {
            return Ok(Self::Cpu);
        }
        let id = device_id(options);
        let opened = open(id).and_then(|stream| Ok((stream.facts(id)?, stream)));
        let (facts, stream) = opened.map_err(|error: ort::Error| explain(&error))?;
        facts.check().map_err(LoadError::Config)?;
        tracing::info!("the GPU is {facts}");
        Ok(Self::Cuda { id, uuid: facts.uuid(), stream })
    }

    /// Memory of the caches and of whole rows of logits.
    fn memory(&self) -> ort::Result<MemoryInfo<'static>> {
        let (device, id) = match *self {
            Self::Cpu => (AllocationDevice::CPU, 0),
            Self::Cuda { id, .. } => (AllocationDevice::CUDA, id),
        };
        MemoryInfo::new(device, id, AllocatorType::Device, MemoryType::Default)
    }

    /// Of that memory.
    pub(super) fn allocator(&self, session: &Session) -> ort::Result<Allocator> {
        Allocator::new(session, self.memory()?)
    }

    /// The UUID of a GPU.
    pub(super) fn uuid(&self) -> Option<&str> {
        match self {
            Self::Cpu => None,
            Self::Cuda { uuid, .. } => Some(uuid),
        }
    }

    /// The stream of a GPU, whose memory the host can't read.
    pub(super) fn stream(&self) -> Option<&CudaStream> {
        match self {
            Self::Cpu => None,
            Self::Cuda { stream, .. } => Some(stream),
        }
    }

    /// Why something that was asked of the device of an open session failed. While a session is opened, the same
    /// codes come of a driver or a device that was wrong from the start, which [`explain`] has better words for.
    pub(super) fn explain(&self, error: &ort::Error) -> LoadError {
        match self {
            Self::Cpu => runtime(error),
            Self::Cuda { .. } => match error.to_string() {
                text if is_permanent(&text) => LoadError::DeviceLost(text),
                _ => explain(error),
            },
        }
    }
}

/// The first GPU unless another one is named.
fn device_id(options: &OrtOptions) -> i32 {
    options.device_id.unwrap_or(0)
}

/// Opens the graph at `path` for its provider.
///
/// # Errors
/// [`LoadError`] in clear words where the provider itself is what fails.
pub(super) fn open(
    environment: &Environment,
    path: &Path,
    device: &Device,
    options: &OrtOptions,
) -> Result<Session, LoadError> {
    let builder = Session::builder(environment).map_err(runtime)?;
    match device {
        Device::Cpu => on_cpu(builder, path, options).map_err(runtime),
        Device::Cuda { id, stream, .. } => {
            on_cuda(builder, path, *id, stream, options).map_err(|error| explain(&error))
        }
    }
}

fn on_cpu(builder: SessionBuilder, path: &Path, options: &OrtOptions) -> ort::Result<Session> {
    let builder = builder
        .with_intra_threads(options.num_threads)?
        // Between two nodes threads look out for work this long: waking one takes as long as a small
        // product. Without an end they would take the processors from HTTP: tests/bench/NOTES.md.
        .with_config_entry("session.intra_op.spin_duration_us", "100")?
        .with_optimization_level(GraphOptimizationLevel::All)?;
    let (num_threads, bit_exact) = (options.num_threads, options.bit_exact);
    glm_kernels::session(builder, num_threads, bit_exact, |mut builder| builder.commit_from_file(path))
}

fn on_cuda(
    builder: SessionBuilder,
    path: &Path,
    device_id: i32,
    stream: &CudaStream,
    options: &OrtOptions,
) -> ort::Result<Session> {
    // SAFETY: the stream lasts as long as the process.
    let provider = unsafe { CUDA::default().with_compute_stream(stream.as_ptr()) };
    let mut provider = provider
        .with_device_id(device_id)
        .with_cuda_graph(!options.enforce_eager)
        // The default doubles at each growth, which next to a large cache runs out of memory early.
        .with_arena_extend_strategy(ArenaExtendStrategy::SameAsRequested)
        // It would round float32 products to 10 bits; the graph has none but in logits' log-sum.
        .with_tf32(false);
    if options.enforce_eager {
        provider = provider.with_arbitrary_config("sdpa_kernel", ATTENTION_WITHOUT_CUDNN);
    }
    if let Some(limit) = options.device_memory_bytes {
        provider = provider.with_memory_limit(limit);
    }
    builder
        .with_intra_threads(options.num_threads)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_disable_cpu_fallback()?
        .with_execution_providers([provider.build().error_on_failure()])?
        .commit_from_file(path)
}

fn explain(error: &ort::Error) -> LoadError {
    let text = error.to_string();
    let hint = if text.contains("libonnxruntime_providers") || text.contains("not enabled in this build") {
        "the library is not onnxruntime-gpu's, or the CUDA 13 libraries (libcudart, libcublas) are not on \
         LD_LIBRARY_PATH"
    } else if text.contains("fallback to CPU EP") || text.contains("have not been partitioned") {
        "a node of the graph has no CUDA kernel: export it with --provider cuda"
    } else if text.contains("driver") || text.contains("device") {
        "CUDA 13 needs an NVIDIA driver of version 580 or later and a GPU of compute capability 7.5 or later"
    } else if text.contains("emory") || text.contains("llocate") {
        "the model does not fit the device's memory: choose a smaller precision, --kv-cache-memory, --max-num-seqs or \
         --max-num-batched-tokens"
    } else {
        "the CUDA provider failed"
    };
    LoadError::Runtime(format!("{hint} ({text})"))
}

/// Allocates one key and one value tensor a layer on the session's device: their input names beside them.
pub(super) fn allocate_caches(
    session: &Session,
    device: &Device,
    geometry: &Geometry,
    graph: &Graph,
    layout: KvCacheLayout,
) -> Result<Vec<(String, DynTensor)>, LoadError> {
    let [block_size, heads, width] = cache_shape(geometry, graph);
    let shape = [layout.num_blocks, block_size, heads, width];
    let allocate = |name: String| {
        let cache = match device {
            Device::Cpu => zeroed(graph.kv_cache_dtype, shape)?,
            // Uninitialised: kernels read no slot that no step wrote.
            Device::Cuda { .. } => {
                DynTensor::new(&device.allocator(session)?, element_type(graph.kv_cache_dtype), shape)?
            }
        };
        Ok((name, cache))
    };
    let names = (0..geometry.num_layers).flat_map(|layer| graph.names.caches(layer));
    names.map(allocate).collect::<ort::Result<_>>().map_err(|error| device.explain(&error))
}

/// A cache on the host.
fn zeroed(dtype: Dtype, shape: [usize; 4]) -> ort::Result<DynTensor> {
    match dtype {
        // As integers, since only their zeros come from the system as they are.
        Dtype::Bfloat16 => {
            let zeros = |num| -> Vec<bf16> { vec![0u16; num].reinterpret_into() };
            Ok(Tensor::from_array(from_a_line(shape, zeros).map_err(ort::Error::wrap)?)?.upcast())
        }
        _ => {
            let zeros = from_a_line(shape, |num| vec![0f32; num]).map_err(ort::Error::wrap)?;
            Ok(Tensor::from_array(zeros)?.upcast())
        }
    }
}

/// As many `zeros` as a cache has, from a cache line on: AMX reads whole ones, and what the system allocates starts
/// 16 bytes after one. Zeroed memory is mapped lazily: it becomes resident as blocks are used.
fn from_a_line<T>(shape: [usize; 4], zeros: impl Fn(usize) -> Vec<T>) -> Result<Array4<T>, ShapeError> {
    let num_elements: usize = shape.iter().product();
    let zeros = zeros(num_elements + LINE / size_of::<T>());
    let start = zeros.as_ptr().align_offset(LINE);
    Array1::from_vec(zeros).slice_move(s![start..start + num_elements]).into_shape_with_order(shape)
}

/// Sizes of a block: tokens, heads, and elements as they are stored.
pub(super) fn cache_shape(geometry: &Geometry, graph: &Graph) -> [usize; 3] {
    let width = match graph.kv_cache_dtype {
        Dtype::Int4 => geometry.head_dim / 2,
        _ => geometry.head_dim,
    };
    [graph.block_size, geometry.num_kv_heads, width]
}

/// What elements of a type are stored as.
pub(super) fn element_type(dtype: Dtype) -> TensorElementType {
    match dtype {
        Dtype::Float32 => TensorElementType::Float32,
        Dtype::Float16 => TensorElementType::Float16,
        Dtype::Bfloat16 => TensorElementType::Bfloat16,
        Dtype::Float8e4m3fn => TensorElementType::Float8E4M3FN,
        Dtype::Int8 => TensorElementType::Int8,
        Dtype::Int4 => TensorElementType::Uint8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_on_the_host_starts_at_a_line_and_is_zero() {
        // Small and large memory come from different places.
        for shape in [[1, 16, 1, 3], [300, 32, 2, 64]] {
            let cache = from_a_line(shape, |num| vec![0u16; num]).unwrap();
            assert_eq!(cache.as_ptr().align_offset(LINE), 0);
            assert_eq!(cache.as_slice().unwrap(), vec![0; shape.iter().product()]);
        }
    }
}
