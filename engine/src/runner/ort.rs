//! Owns the ONNX Runtime session and the KV cache's memory; with the crate glm-kernels, the only
//! place that knows `ort`.
//!
//! Invariant: cache tensors are allocated once, bound once and never copied; the attention operator
//! writes them in place while this runner holds them exclusively.

mod buffer;
mod cuda_graphs;
mod device_error;
mod inputs;
mod options;
mod outputs;
mod provider;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::environment::Environment;
use ort::session::{IoBinding, Session};
use ort::value::{DynTensor, Outlet, TensorElementType};

use self::cuda_graphs::{CudaGraphs, GraphIndex, MAX_ROWS};
use self::device_error::runtime;
use self::inputs::Inputs;
pub use self::options::OrtOptions;
use self::outputs::{OutputMemory, Outputs, Widths, failed};
use self::provider::Device;
use super::{KvCacheLayout, ModelRunner};
use crate::error::{LoadError, RunError};
use crate::model::manifest::{Geometry, Graph, Manifest};
use crate::step::{StepOutput, StepPlan};

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
        let graph = manifest.graph.clone();
        provider::check_options(graph.provider, graph.kernel, options)?;
        let layout = layout(&manifest.geometry, &graph, options.kv_cache_bytes)?;
        let environment = environment(&options.library)?;
        let device = Device::new(graph.provider, options);
        let session = provider::open(environment, &dir.join(&graph.file), graph.provider, options)?;
        let widths = check_contract(&session, &manifest.geometry, &graph)?;
        let caches = provider::allocate_caches(&session, device, &manifest.geometry, &graph, layout)?;
        let prepare = || {
            let mut binding = session.create_binding()?;
            for (name, cache) in &caches {
                binding.bind_input(name, cache)?;
            }
            let allocator = || device.allocator(&session);
            let max_num_blocks = manifest.geometry.max_model_len.div_ceil(graph.block_size);
            let max_num_blocks = max_num_blocks.min(layout.num_blocks);
            let cuda_graphs = (device.is_apart() && !options.enforce_eager)
                .then(|| CudaGraphs::new(allocator, widths, graph.block_size, max_num_blocks))
                .transpose()?;
            Ok((binding, OutputMemory::new(allocator, widths, 1, false)?, cuda_graphs))
        };
        let (binding, memory, cuda_graphs) = prepare().map_err(|error: ort::Error| device.explain(&error))?;
        Ok(Self {
            binding,
            outputs: None,
            memory,
            cuda_graphs,
            inputs: Inputs::new(device.is_apart()),
            caches,
            session,
            device,
            widths,
            graph,
            layout,
            bound: BoundStep::default(),
        })
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
            let allocator = || self.device.allocator(&self.session);
            let num_rows = num_rows.max(2 * self.memory.num_rows());
            self.memory = OutputMemory::new(allocator, self.widths, num_rows, false)?;
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
        let BoundStep { num_rows, cuda_graph } = self.bound;
        if let (Some(graphs), Some(index)) = (&mut self.cuda_graphs, cuda_graph) {
            return graphs.run(&mut self.session, index, num_rows).map_err(failed);
        }
        let outputs = self.outputs.as_mut().ok_or_else(|| RunError::new("no step is bound"))?;
        let result = match &self.cuda_graphs {
            Some(graphs) => self.session.run_binding_with_options(&self.binding, graphs.uncaptured()),
            None => self.session.run_binding(&self.binding),
        };
        result.map(drop).and_then(|()| outputs.written(num_rows)).map_err(failed)
    }

    /// What the step wrote, until the next one is bound.
    ///
    /// # Errors
    /// [`RunError`] if the library fails, or nothing was computed.
    pub fn output(&mut self) -> Result<StepOutput<'_>, RunError> {
        let outputs = match (&mut self.cuda_graphs, self.bound.cuda_graph) {
            (Some(graphs), Some(index)) => graphs.outputs(index),
            _ => self.outputs.as_mut(),
        };
        outputs.ok_or_else(|| RunError::new("no step has run"))?.view()
    }
}

/// Compares the graph's inputs and outputs with what the manifest promises.
fn check_contract(session: &Session, geometry: &Geometry, graph: &Graph) -> Result<Widths, LoadError> {
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
    let mut widths = Vec::new();
    for (name, wanted) in names.topk().into_iter().flatten().zip(types) {
        let found = dtype_of(session.outputs(), name);
        let (_, shape) =
            found.filter(|(ty, shape)| *ty == wanted && shape.len() == 2).ok_or_else(|| wrong(name))?;
        widths.push(usize::try_from(shape[1]).map_err(|_| wrong(name))?);
    }
    Ok(Widths { logits: geometry.padded_vocab_size, topk: check_topk(&widths, geometry.vocab_size)? })
}

/// The number of candidates, from the columns of ids, values and logsumexp; none of a graph without them.
fn check_topk(widths: &[usize], vocab_size: usize) -> Result<Option<usize>, LoadError> {
    match *widths {
        [] => Ok(None),
        [ids, values, 1] if ids == values && (1..=vocab_size).contains(&ids) => Ok(Some(ids)),
        _ => Err(LoadError::Config(format!(
            "the graph returns {widths:?} columns of topk_ids, topk_values and logsumexp: the first two must be \
             equal and from 1 to the model's vocab_size {vocab_size}, the last 1"
        ))),
    }
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

    /// The library keeps CUDA graphs by thread.
    fn prepare(&mut self, max_num_seqs: usize) -> Result<(), LoadError> {
        let Some(graphs) = &mut self.cuda_graphs else { return Ok(()) };
        if max_num_seqs > MAX_ROWS {
            return Err(LoadError::Config(format!(
                "--max-num-seqs {max_num_seqs}: CUDA graphs hold up to {MAX_ROWS} sequences; choose no more, or \
                 --enforce-eager"
            )));
        }
        graphs
            .capture(&mut self.session, &self.caches, &self.graph.names, max_num_seqs)
            .map_err(|error| self.device.explain(&error))
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
    fn candidates_are_bound_by_the_vocabulary() {
        assert_eq!(check_topk(&[], 100).unwrap(), None);
        assert_eq!(check_topk(&[64, 64, 1], 100).unwrap(), Some(64));
        assert_eq!(check_topk(&[100, 100, 1], 100).unwrap(), Some(100));
        for widths in [&[101, 101, 1][..], &[0, 0, 1], &[64, 63, 1], &[64, 64, 2], &[64]] {
            let error = check_topk(widths, 100).unwrap_err().to_string();
            assert!(error.contains("topk_ids") && error.contains("vocab_size 100"), "{error}");
        }
    }

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
