//! Owns the ONNX Runtime session and the KV cache's memory; with `operators`, the only place that
//! knows `ort`.
//!
//! Invariant: cache tensors are allocated once, bound once and never copied; the attention operator
//! writes them in place while this runner holds them exclusively.

mod inputs;

use std::path::{Path, PathBuf};

use ndarray::ArrayView2;
use ort::environment::Environment;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{IoBinding, Session};
use ort::value::{DynValue, Outlet, Tensor, TensorElementType};

use self::inputs::bind_step;
use super::{KvCacheLayout, ModelRunner};
use crate::error::{LoadError, RunError};
use crate::manifest::{Dtype, Geometry, Graph, Manifest, Provider};
use crate::operators;
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
}

/// Runs a model folder's graph.
#[derive(Debug)]
pub struct OrtRunner {
    session: Session,
    /// Holds the caches and the current step's inputs.
    binding: IoBinding,
    graph: Graph,
    layout: KvCacheLayout,
    logits_memory: MemoryInfo<'static>,
    logits: Option<DynValue>,
}

fn runtime(error: impl std::fmt::Display) -> LoadError {
    LoadError::Runtime(error.to_string())
}

impl OrtRunner {
    /// Loads the graph of the folder `dir`, described by `manifest`, and allocates the KV cache.
    ///
    /// # Errors
    /// [`LoadError`]: the library, the graph or the budget doesn't fit.
    pub fn load(dir: &Path, manifest: &Manifest, options: &OrtOptions) -> Result<Self, LoadError> {
        let graph = manifest.graph.clone();
        if graph.provider != Provider::Cpu || graph.kv_cache_dtype != Dtype::Float32 {
            return Err(LoadError::Config(
                "this graph is for the CUDA provider, which this build cannot run yet: export for the CPU"
                    .into(),
            ));
        }
        let layout = layout(&manifest.geometry, &graph, options.kv_cache_bytes)?;
        let environment = ort::init_from(&options.library).map_err(|error| {
            LoadError::Config(format!(
                "cannot load ONNX Runtime from {} ({error}): name the library, which the Python package \
                 onnxruntime 1.31.1 holds as onnxruntime/capi/libonnxruntime.so.1.31.1",
                options.library.display()
            ))
        })?;
        // On by default in the library: it would send usage, model name and machine to its makers.
        let environment = environment.with_name("glmserve").with_telemetry(false);
        let environment = environment.build().map_err(runtime)?;
        let session = open(&environment, &dir.join(&graph.file), options.num_threads).map_err(runtime)?;
        check_contract(&session, &manifest.geometry, &graph)?;
        let mut binding = session.create_binding().map_err(runtime)?;
        bind_caches(&mut binding, &manifest.geometry, &graph, layout).map_err(runtime)?;
        let logits_memory =
            MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::Default);
        let logits_memory = logits_memory.map_err(runtime)?;
        Ok(Self { session, binding, graph, layout, logits_memory, logits: None })
    }

    fn run_bound(&mut self, plan: &StepPlan) -> ort::Result<DynValue> {
        // The previous step's logits go back to the arena before the next ones are taken.
        self.logits = None;
        bind_step(&mut self.binding, &self.graph.names, plan)?;
        // A binding keeps the tensor it returned, and the next step may want another number of rows.
        self.binding.bind_output_to_device(self.graph.names.logits.as_str(), &self.logits_memory)?;
        let mut outputs = self.session.run_binding(&self.binding)?;
        let name = self.graph.names.logits.as_str();
        outputs.remove(name).ok_or_else(|| ort::Error::new(format!("the graph has no output {name}")))
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
    let cache = [graph.block_size, geometry.num_kv_heads, geometry.head_dim].map(|size| size as i64);
    for name in (0..geometry.num_layers).flat_map(|layer| names.caches(layer)) {
        let found = dtype_of(session.inputs(), &name);
        let fits = |(ty, shape): &(_, Vec<i64>)| *ty == TensorElementType::Float32 && shape.ends_with(&cache);
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
    found.filter(fits).map(drop).ok_or_else(|| wrong(&names.logits))
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

fn open(environment: &Environment, path: &Path, num_threads: usize) -> ort::Result<Session> {
    Session::builder(environment)?
        .with_intra_threads(num_threads)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_operators(operators::domain(num_threads)?)?
        .commit_from_file(path)
}

/// Allocates one key and one value tensor a layer and binds them as inputs.
fn bind_caches(
    binding: &mut IoBinding,
    geometry: &Geometry,
    graph: &Graph,
    layout: KvCacheLayout,
) -> ort::Result<()> {
    let shape = [layout.num_blocks, layout.block_size, geometry.num_kv_heads, geometry.head_dim];
    for layer in 0..geometry.num_layers {
        for name in graph.names.caches(layer) {
            // Zeroed memory is mapped lazily: it becomes resident as blocks are used.
            let cache = Tensor::from_array((shape, vec![0f32; shape.iter().product()]))?;
            binding.bind_input(name, &cache)?;
        }
    }
    Ok(())
}

impl ModelRunner for OrtRunner {
    fn kv_cache(&self) -> KvCacheLayout {
        self.layout
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        let failed = |error: ort::Error| RunError(error.to_string());
        let logits = self.run_bound(plan).map_err(failed)?;
        let (shape, values) = self.logits.insert(logits).try_extract_tensor::<f32>().map_err(failed)?;
        // A step without wanted rows still asked for one: see `bind_step`.
        let num_rows = plan.logits_indices.len();
        let width = shape.last().map_or(0, |&width| width as usize);
        let wanted = values.get(..num_rows * width);
        let logits = wanted.and_then(|wanted| ArrayView2::from_shape((num_rows, width), wanted).ok());
        let logits =
            logits.ok_or_else(|| RunError(format!("{num_rows} rows of logits have shape {shape:?}")))?;
        Ok(StepOutput { logits })
    }
}
