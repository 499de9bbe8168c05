//! Owns the ONNX Runtime session and the KV cache's memory; with `operators`, the only place that
//! knows `ort`.
//!
//! Invariant: cache tensors are allocated once, bound once and never copied; the attention operator
//! writes them in place while this runner holds them exclusively.

mod inputs;
mod outputs;
mod provider;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::environment::Environment;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, Session};
use ort::value::{Outlet, TensorElementType};

use self::inputs::bind_step;
use self::outputs::Outputs;
use self::provider::Device;
use super::{KvCacheLayout, ModelRunner};
use crate::error::{LoadError, RunError};
use crate::manifest::{Geometry, Graph, Manifest};
use crate::step::{StepOutput, StepPlan};

/// How to run a graph.
#[derive(Debug, Clone)]
pub struct OrtOptions {
    /// The ONNX Runtime shared library.
    pub library: PathBuf,
    /// Threads of the session, the engine's own thread included.
    pub num_threads: usize,
    /// Most bytes the KV cache may take.
    pub kv_cache_bytes: usize,
    /// Which GPU; for graphs of the CUDA provider.
    pub device_id: i32,
    /// Most bytes of the GPU's memory, cache and weights included; for graphs of the CUDA provider.
    pub device_memory_bytes: Option<usize>,
}

/// Runs a model folder's graph.
#[derive(Debug)]
pub struct OrtRunner {
    session: Session,
    /// Holds the caches and the current step's inputs.
    binding: IoBinding,
    graph: Graph,
    layout: KvCacheLayout,
    rows_memory: MemoryInfo<'static>,
    host_memory: MemoryInfo<'static>,
    outputs: Outputs,
}

fn runtime(error: impl std::fmt::Display) -> LoadError {
    LoadError::Runtime(error.to_string())
}

/// ONNX Runtime's state of this process. It stays: the crate keeps sessions of its own that copy
/// tensors between devices, and allows no second one.
static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();

/// Loads the library, the first time.
fn environment(library: &Path) -> Result<&'static Environment, LoadError> {
    if let Some(environment) = ENVIRONMENT.get() {
        return Ok(environment);
    }
    let environment = ort::init_from(library).map_err(|error| {
        LoadError::Config(format!(
            "cannot load ONNX Runtime from {} ({error}): name the library, which the Python package \
             onnxruntime (for CUDA onnxruntime-gpu) 1.31.1 holds as onnxruntime/capi/libonnxruntime.so.1.31.1",
            library.display()
        ))
    })?;
    // On by default in the library: it would send usage, model name and machine to its makers.
    let environment = environment.with_name("glmserve").with_telemetry(false);
    let environment = environment.build().map_err(runtime)?;
    Ok(ENVIRONMENT.get_or_init(|| environment))
}

impl OrtRunner {
    /// Loads the graph of the folder `dir`, described by `manifest`, and allocates the KV cache.
    ///
    /// # Errors
    /// [`LoadError`]: the library, the graph or the budget doesn't fit.
    pub fn load(dir: &Path, manifest: &Manifest, options: &OrtOptions) -> Result<Self, LoadError> {
        let graph = manifest.graph.clone();
        let layout = layout(&manifest.geometry, &graph, options.kv_cache_bytes)?;
        let environment = environment(&options.library)?;
        let device = Device::new(graph.provider, options);
        let session = provider::open(environment, &dir.join(&graph.file), graph.provider, options)?;
        check_contract(&session, &manifest.geometry, &graph)?;
        let mut binding = session.create_binding().map_err(runtime)?;
        provider::bind_caches(&session, &mut binding, device, &manifest.geometry, &graph, layout)?;
        let rows_memory = device.memory().map_err(runtime)?;
        let host_memory =
            MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::Default)
                .map_err(runtime)?;
        let outputs = Outputs::default();
        Ok(Self { session, binding, graph, layout, rows_memory, host_memory, outputs })
    }

    fn run_bound(&mut self, plan: &StepPlan) -> ort::Result<()> {
        // The previous step's rows go back to the arena before the next ones are taken.
        self.outputs = Outputs::default();
        let names = &self.graph.names;
        bind_step(&mut self.binding, names, plan)?;
        outputs::bind(&mut self.binding, names, &self.rows_memory, &self.host_memory)?;
        let mut outputs = self.session.run_binding(&self.binding)?;
        self.outputs = Outputs::take(&mut outputs, names, plan.logits_indices.len())?;
        Ok(())
    }
}

/// Compares the graph's inputs and outputs with what the manifest promises.
fn check_contract(session: &Session, geometry: &Geometry, graph: &Graph) -> Result<(), LoadError> {
    let names = &graph.names;
    let dtype_of = |outlets: &[Outlet], name: &str| {
        let outlet = outlets.iter().find(|outlet| outlet.name() == name);
        outlet
            .and_then(|outlet| Some((outlet.dtype().tensor_type()?, outlet.dtype().tensor_shape()?.to_vec())))
    };
    let wrong =
        |name: &str| LoadError::Config(format!("the graph does not have {name} as the manifest says"));
    for name in names.small_inputs() {
        let found = dtype_of(session.inputs(), name);
        found.filter(|(ty, _)| *ty == TensorElementType::Int32).ok_or_else(|| wrong(name))?;
    }
    let cache = provider::cache_shape(geometry, graph).map(|size| size as i64);
    let cache_type = provider::element_type(graph.kv_cache_dtype);
    for name in (0..geometry.num_layers).flat_map(|layer| names.caches(layer)) {
        let found = dtype_of(session.inputs(), &name);
        let fits = |(ty, shape): &(_, Vec<i64>)| *ty == cache_type && shape.ends_with(&cache);
        found.filter(fits).ok_or_else(|| wrong(&name))?;
    }
    let num_inputs = names.small_inputs().len() + 2 * geometry.num_layers;
    if session.inputs().len() != num_inputs {
        let found = session.inputs().len();
        return Err(LoadError::Config(format!("the graph has {found} inputs, the manifest {num_inputs}")));
    }
    let found = dtype_of(session.outputs(), &names.logits);
    let width = geometry.padded_vocab_size as i64;
    let fits = |(ty, shape): &(_, Vec<i64>)| {
        *ty == TensorElementType::Float32 && shape.len() == 2 && shape[1] == width
    };
    found.filter(fits).ok_or_else(|| wrong(&names.logits))?;
    let types = [TensorElementType::Int32, TensorElementType::Float32, TensorElementType::Float32];
    for (name, wanted) in names.topk().into_iter().flatten().zip(types) {
        let found = dtype_of(session.outputs(), name);
        found.filter(|(ty, shape)| *ty == wanted && shape.len() == 2).ok_or_else(|| wrong(name))?;
    }
    Ok(())
}

/// As many blocks as the budget holds.
fn layout(geometry: &Geometry, graph: &Graph, kv_cache_bytes: usize) -> Result<KvCacheLayout, LoadError> {
    let block_bytes = geometry.kv_bytes_per_token(graph.kv_cache_dtype) * graph.block_size;
    // More than i32 slots can't be named in the contract.
    let num_blocks = (kv_cache_bytes / block_bytes).min(i32::MAX as usize / graph.block_size);
    if num_blocks == 0 {
        return Err(LoadError::Config(format!(
            "the KV cache budget of {kv_cache_bytes} bytes holds no block: one takes {block_bytes} bytes"
        )));
    }
    Ok(KvCacheLayout { num_blocks, block_size: graph.block_size, num_bytes: num_blocks * block_bytes })
}

impl ModelRunner for OrtRunner {
    fn kv_cache(&self) -> KvCacheLayout {
        self.layout
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        self.run_bound(plan).map_err(|error| RunError(error.to_string()))?;
        self.outputs.view()
    }
}
