//! Owns the ONNX Runtime session and the KV cache's memory; with the crate glm-kernels, the only
//! place that knows `ort`.
//!
//! Invariant: cache tensors are allocated once, bound once and never copied; the attention operator
//! writes them in place while this runner holds them exclusively.

mod buffer;
mod contract;
mod cuda;
mod device_error;
mod inputs;
mod options;
mod outputs;
mod provider;
mod rows;
pub mod sizing;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::environment::Environment;
use ort::memory::Allocator;
use ort::session::{IoBinding, Session};
use ort::value::DynTensor;

use self::contract::check_contract;
use self::cuda::graphs::{CudaGraphs, GraphIndex};
use self::cuda::profile;
use self::device_error::{failed, runtime};
use self::inputs::Inputs;
pub use self::options::{KvCacheMemory, OrtOptions};
use self::outputs::{OutputMemory, Outputs, Widths};
use self::provider::Device;
use self::rows::Rows;
use super::{KvCacheLayout, ModelRunner};
use crate::error::{LoadError, RunError};
use crate::model::manifest::{Geometry, Graph, Manifest};
use crate::step::{Logits, StepOutput, StepPlan};

/// Runs a model folder's graph. [`ModelRunner::run`] is [`OrtRunner::bind`], [`OrtRunner::compute`] and
/// [`OrtRunner::output`], which can be called one by one to measure them.
#[derive(Debug)]
pub struct OrtRunner {
    // What is bound to memory goes before the memory does.
    /// Holds the caches and the current step's inputs, unless that is captured.
    binding: IoBinding,
    outputs: Option<Outputs>,
    memory: OutputMemory,
    cuda_graphs: Option<CudaGraphs>,
    inputs: Inputs,
    rows: Rows,
    caches: Vec<(String, DynTensor)>,
    session: Session,
    device: Device,
    widths: Widths,
    graph: Graph,
    layout: KvCacheLayout,
    bound: BoundStep,
}

/// The step that is bound.
#[derive(Debug, Default)]
struct BoundStep {
    /// Rows it wants.
    num_rows: usize,
    /// How it is captured.
    cuda_graph: Option<GraphIndex>,
}

/// ONNX Runtime's state of this process. It stays: the crate keeps sessions of its own that copy
/// tensors between devices, and allows no second one.
static ENVIRONMENT: OnceLock<(PathBuf, Environment)> = OnceLock::new();

/// Loads the library, the first time; there can't be another one later.
fn environment(library: &Path) -> Result<&'static Environment, LoadError> {
    if let Some((loaded, environment)) = ENVIRONMENT.get() {
        return match is_same_file(loaded, library) {
            true => Ok(environment),
            false => Err(LoadError::Config(format!(
                "this process has loaded ONNX Runtime from {} already, and can't load {} as well",
                loaded.display(),
                library.display()
            ))),
        };
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
    Ok(&ENVIRONMENT.get_or_init(|| (library.to_owned(), environment)).1)
}

/// Whether two paths name one library; those that the loader looks up are compared as they are.
fn is_same_file(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

impl OrtRunner {
    /// Loads the graph of the folder `dir`, described by `manifest`, and allocates the KV cache.
    ///
    /// # Errors
    /// [`LoadError`]: the library, the graph, the budget or an option doesn't fit.
    pub fn load(dir: &Path, manifest: &Manifest, options: &OrtOptions) -> Result<Self, LoadError> {
        let graph = &manifest.graph;
        options.check(graph)?;
        let num_bytes = match options.kv_cache {
            KvCacheMemory::Bytes(num_bytes) => num_bytes,
            KvCacheMemory::Utilization(_) => block_bytes(&manifest.geometry, graph),
        };
        let layout = layout(&manifest.geometry, graph, num_bytes)?;
        let environment = environment(&options.library)?;
        let device = Device::open(environment, graph.provider, options)?;
        let session = provider::open(environment, &dir.join(&graph.file), &device, options)?;
        let widths = check_contract(&session, &manifest.geometry, graph)?;
        let runner = Self::with_cache(session, device, widths, manifest, options, layout, 0)?;
        match options.kv_cache {
            KvCacheMemory::Bytes(_) => Ok(runner),
            KvCacheMemory::Utilization(utilization) => runner.grown(manifest, options, utilization),
        }
    }

    /// The runner of an open session, with a cache of this size. The first `num_graph_ids` ids of CUDA graphs were
    /// used.
    fn with_cache(
        session: Session,
        device: Device,
        widths: Widths,
        manifest: &Manifest,
        options: &OrtOptions,
        layout: KvCacheLayout,
        num_graph_ids: usize,
    ) -> Result<Self, LoadError> {
        let graph = manifest.graph.clone();
        let caches = provider::allocate_caches(&session, &device, &manifest.geometry, &graph, layout)?;
        let prepare = || {
            let mut binding = session.create_binding()?;
            for (name, cache) in &caches {
                binding.bind_input(name, cache)?;
            }
            let allocator = || device.allocator(&session);
            let max_num_blocks = manifest.geometry.max_model_len.div_ceil(graph.block_size);
            let max_num_blocks = max_num_blocks.min(layout.num_blocks);
            let stream = device.stream().filter(|_| !options.enforce_eager);
            let cuda_graphs = |stream| {
                let sizes = [graph.block_size, max_num_blocks, options.max_num_seqs];
                CudaGraphs::new(allocator, stream, widths, sizes, num_graph_ids)
            };
            let memory = OutputMemory::new(allocator()?, || Ok(Allocator::default()), widths, 1)?;
            let rows = Rows::new(widths.logits, device.stream())?;
            Ok((binding, memory, rows, stream.map(cuda_graphs).transpose()?))
        };
        let (binding, memory, rows, cuda_graphs) =
            prepare().map_err(|error: ort::Error| device.explain(&error))?;
        Ok(Self {
            binding,
            outputs: None,
            memory,
            cuda_graphs,
            inputs: Inputs::new(device.stream().is_some()),
            rows,
            caches,
            session,
            device,
            widths,
            graph,
            layout,
            bound: BoundStep::default(),
        })
    }

    /// The same runner with a cache that takes what its GPU has left of a part of its memory. How much that is, the
    /// largest steps show: they are run over the cache that is here.
    fn grown(
        mut self,
        manifest: &Manifest,
        options: &OrtOptions,
        utilization: f64,
    ) -> Result<Self, LoadError> {
        let geometry = &manifest.geometry;
        let plan = profile::largest_step(geometry, &self.graph, options);
        if let Err(error) = self.run(&plan) {
            return Err(self.device.explain(&ort::Error::new(error.message)));
        }
        let measured = self.measure_graphs().map_err(|error| self.device.explain(&error))?;
        let bytes = profile::cache_bytes(&measured, utilization, profile::expansion(geometry, &self.graph))
            .map_err(LoadError::Config)?;
        let num_graph_ids = self.cuda_graphs.as_ref().map_or(0, CudaGraphs::num_ids);
        let Self {
            binding, outputs, memory, cuda_graphs, rows, caches, session, device, widths, graph, ..
        } = self;
        drop((binding, outputs, cuda_graphs, memory, rows, caches));
        let layout = layout(geometry, &graph, bytes)?;
        Self::with_cache(session, device, widths, manifest, options, layout, num_graph_ids)
    }

    /// The memory of the device, and how much of it all graphs take that will be captured.
    fn measure_graphs(&mut self) -> ort::Result<profile::Measured> {
        let Some(stream) = self.device.stream().cloned() else {
            return Err(ort::Error::new("there is no GPU to measure"));
        };
        let before = stream.memory()?;
        let Some(graphs) = &mut self.cuda_graphs else {
            return Ok(profile::Measured { memory: before, graph_bytes: 0, num_graphs: 0 });
        };
        let indices = graphs.indices();
        // The cache that comes may hold long contexts, which have graphs of their own.
        let num_graphs = graphs.max_num_graphs();
        // The largest take memory that all others find, beside what each graph takes for itself.
        let mut graph_bytes = 0;
        let mut last = before;
        for &index in indices.iter().take(3) {
            graphs.capture(&mut self.session, &self.caches, &self.graph.names, index)?;
            let memory = stream.memory()?;
            graph_bytes = last.free.saturating_sub(memory.free);
            last = memory;
        }
        Ok(profile::Measured { memory: last, graph_bytes, num_graphs })
    }

    /// The UUID of the GPU that computes, as NVIDIA's tools write it; none where it is the CPU.
    pub fn gpu_uuid(&self) -> Option<&str> {
        self.device.uuid()
    }

    /// Writes a step's inputs.
    ///
    /// # Errors
    /// [`RunError`] if the library fails.
    pub fn bind(&mut self, plan: &StepPlan) -> Result<(), RunError> {
        let cuda_graph = self.cuda_graphs.as_ref().and_then(|graphs| graphs.find(plan));
        self.bound = BoundStep { num_rows: plan.logits_indices.len(), cuda_graph };
        let names = &self.graph.names;
        if let (Some(graphs), Some(index)) = (&mut self.cuda_graphs, cuda_graph) {
            return graphs.bind(&self.session, &self.caches, names, plan, index).map_err(failed);
        }
        self.inputs.bind(&mut self.binding, names, plan).map_err(failed)?;
        self.bind_outputs(plan.logits_indices.len().max(1)).map_err(failed)
    }

    /// Binds outputs of `num_rows` rows, if they are not; a step without wanted rows asks for one.
    fn bind_outputs(&mut self, num_rows: usize) -> ort::Result<()> {
        if self.outputs.as_ref().is_some_and(|outputs| outputs.num_bound_rows() == num_rows) {
            return Ok(());
        }
        self.binding.clear_outputs();
        self.outputs = None;
        if self.memory.num_rows() < num_rows {
            let num_rows = num_rows.max(2 * self.memory.num_rows());
            let rows = self.device.allocator(&self.session)?;
            // The library copies candidates to the host.
            self.memory = OutputMemory::new(rows, || Ok(Allocator::default()), self.widths, num_rows)?;
        }
        // SAFETY: the binding's outputs are cleared before the memory is replaced, and it goes first.
        self.outputs = Some(unsafe { self.memory.bind(&mut self.binding, &self.graph.names, num_rows) }?);
        Ok(())
    }

    /// Runs the step that is bound.
    ///
    /// # Errors
    /// [`RunError`] if the library fails.
    pub fn compute(&mut self) -> Result<(), RunError> {
        if let (Some(graphs), Some(index)) = (&mut self.cuda_graphs, self.bound.cuda_graph) {
            return graphs.run(&mut self.session, index).map_err(failed);
        }
        if self.outputs.is_none() {
            return Err(RunError::new("no step is bound"));
        }
        let result = match &self.cuda_graphs {
            Some(graphs) => self.session.run_binding_with_options(&self.binding, graphs.uncaptured()),
            None => self.session.run_binding(&self.binding),
        };
        result.map(drop).map_err(failed)
    }

    /// What the step wrote, until the next one is bound.
    ///
    /// # Errors
    /// [`RunError`] if nothing was computed.
    pub fn output(&mut self) -> Result<StepOutput<'_>, RunError> {
        let BoundStep { num_rows, cuda_graph } = self.bound;
        let (rows, candidates) = match (&self.cuda_graphs, cuda_graph, &self.outputs) {
            (Some(graphs), Some(index), _) => (graphs.rows(index), graphs.candidates(index, num_rows)?),
            (_, _, Some(outputs)) => (Some(outputs.rows()), outputs.candidates(num_rows)?),
            _ => (None, None),
        };
        let start = rows.ok_or_else(|| RunError::new("no step has run"))?;
        // SAFETY: the step wrote so many rows there, and the memory is not written before the next step.
        unsafe { self.rows.set(start, num_rows) };
        Ok(StepOutput { candidates, logits: Logits::Elsewhere(&mut self.rows) })
    }
}

/// Bytes of a block's keys and values over all layers.
fn block_bytes(geometry: &Geometry, graph: &Graph) -> usize {
    geometry.kv_bytes_per_token(graph.kv_cache_dtype) * graph.block_size
}

/// As many blocks as the budget holds.
fn layout(geometry: &Geometry, graph: &Graph, kv_cache_bytes: usize) -> Result<KvCacheLayout, LoadError> {
    let block_bytes = block_bytes(geometry, graph);
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

    /// Captures the decode steps of up to as many sequences as the options say. ONNX Runtime keeps CUDA graphs for
    /// each thread: only the one that calls this can replay them.
    fn prepare(&mut self) -> Result<(), LoadError> {
        let Some(graphs) = &mut self.cuda_graphs else { return Ok(()) };
        for index in graphs.indices() {
            graphs
                .capture(&mut self.session, &self.caches, &self.graph.names, index)
                .map_err(|error| self.device.explain(&error))?;
        }
        Ok(())
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        self.bind(plan)?;
        self.compute()?;
        self.output()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_library_has_many_paths() {
        let folder = std::env::temp_dir().join(format!("glm-engine-library-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let [a, b, link] = ["a.so", "b.so", "link.so"].map(|name| folder.join(name));
        std::fs::write(&a, "").unwrap();
        std::fs::write(&b, "").unwrap();
        std::os::unix::fs::symlink("a.so", &link).unwrap();
        let found = [(&a, &a), (&a, &link), (&a, &b)].map(|(a, b)| is_same_file(a, b));
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found, [true, true, false]);
        assert!(is_same_file(Path::new("libonnxruntime.so"), Path::new("libonnxruntime.so")));
        assert!(!is_same_file(Path::new("libonnxruntime.so"), Path::new("libother.so")));
    }
}
