//! Owns the decode steps that are captured as CUDA graphs: one launch in place of one a kernel.
//!
//! A step in which every sequence has one token is padded to a bucket of rows. A graph is captured for each bucket
//! before the first request, or when it is first needed, and replayed from then on: the library looks at no tensor
//! any more, so inputs and outputs stay where they were and inputs are written in place.
//! Invariants: all memory that graphs read or write was taken before the first capture, so none of it lies where a
//! captured graph keeps its intermediate values; no graph id is used twice, since a run that failed may have
//! left half a graph under its own.

use std::ops::Range;

use ort::memory::Allocator;
use ort::session::{IoBinding, RunOptions, Session};
use ort::value::{DynTensor, Tensor, TensorElementType};

use super::super::buffer::Buffer;
use super::super::outputs::{OutputMemory, Outputs, Widths, copied_candidates};
use super::buckets::{ROWS, bucket};
use super::input_layout::InputLayout;
use super::runtime::{CudaStream, Pinned};
use crate::error::RunError;
use crate::model::manifest::TensorNames;
use crate::step::{Candidates, StepPlan};

/// Contexts up to this are not split among processors by the library's attention (1.31.1,
/// `kFlashSplitKvMinSequenceLength`). The bounds that it chooses by are frozen in a graph, so that short and long
/// contexts have graphs of their own: a long one that was not split would leave most of the device idle.
const SHORT_CONTEXT: usize = 512;

/// Run option of the library: which graph to capture or replay.
const GRAPH_ID: &str = "gpu_graph_id";

/// All graphs of a session.
pub(in crate::runner::ort) struct CudaGraphs {
    /// By [`GraphIndex::context`] and bucket.
    graphs: [[Option<CudaGraph>; ROWS.len()]; 2],
    /// The largest bucket that is captured.
    last_bucket: usize,
    /// Ids that were used in the session, by others too.
    num_ids: usize,
    block_size: usize,
    /// Widths of the block tables: short contexts', long ones'.
    table_widths: [usize; 2],
    stream: CudaStream,
    /// A step's inputs, one behind the other: on the host, and on the device.
    host_inputs: Pinned,
    inputs: Buffer,
    outputs: OutputMemory,
    /// The candidates of the step that has run, and their number of columns.
    host_candidates: Option<(Pinned, usize)>,
    /// For all other steps.
    uncaptured: RunOptions,
}

/// One captured step.
struct CudaGraph {
    binding: IoBinding,
    options: RunOptions,
    layout: InputLayout,
    outputs: Outputs,
}

/// Which graph a step uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::runner::ort) struct GraphIndex {
    /// 0 if all contexts are short, else 1.
    context: usize,
    /// Which of the numbers of rows.
    bucket: usize,
}

impl std::fmt::Debug for CudaGraphs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaGraphs").field("num_ids", &self.num_ids).finish_non_exhaustive()
    }
}

impl CudaGraphs {
    /// Takes the memory for steps of up to `max_num_seqs` sequences, of which none is longer than `max_num_blocks`
    /// blocks. The first `num_ids` ids of graphs were used before.
    pub(in crate::runner::ort) fn new(
        device: impl Fn() -> ort::Result<Allocator>,
        stream: &CudaStream,
        widths: Widths,
        [block_size, max_num_blocks, max_num_seqs]: [usize; 3],
        num_ids: usize,
    ) -> ort::Result<Self> {
        let last_bucket = bucket(max_num_seqs.max(1)).unwrap_or(ROWS.len() - 1);
        let table_widths = [SHORT_CONTEXT.div_ceil(block_size).min(max_num_blocks), max_num_blocks];
        let num_bytes = InputLayout::new(ROWS[last_bucket], max_num_blocks).len * size_of::<i32>();
        let mut uncaptured = RunOptions::new()?;
        uncaptured.set(GRAPH_ID, "-1")?;
        let host_candidates = |width| -> ort::Result<_> {
            Ok((stream.pinned(widths.candidate_bytes(ROWS[last_bucket]))?, width))
        };
        let host_candidates = widths.topk.map(host_candidates).transpose()?;
        let mut outputs = OutputMemory::new(device()?, &device, widths, ROWS[last_bucket])?;
        if let (Some((zeros, _)), Some(candidates)) = (&host_candidates, outputs.candidates()) {
            // Whatever is read before it was written names a token that there is.
            // SAFETY: both have room for the candidates of the largest bucket.
            unsafe {
                stream.upload(zeros, widths.candidate_bytes(ROWS[last_bucket]), candidates.cast_mut())
            }?;
            stream.wait()?;
        }
        Ok(Self {
            graphs: Default::default(),
            last_bucket,
            num_ids,
            block_size,
            table_widths,
            stream: stream.clone(),
            host_inputs: stream.pinned(num_bytes)?,
            inputs: Buffer::new(device()?, num_bytes)?,
            outputs,
            host_candidates,
            uncaptured,
        })
    }

    /// Ids of graphs that were used.
    pub(in crate::runner::ort) fn num_ids(&self) -> usize {
        self.num_ids
    }

    /// The graph of a step, unless it is one that is not captured.
    pub(in crate::runner::ort) fn find(&self, plan: &StepPlan) -> Option<GraphIndex> {
        let index = GraphIndex::of(plan, self.table_widths.map(|width| width * self.block_size))?;
        (index.bucket <= self.last_bucket).then_some(index)
    }

    /// All graphs that steps may need, those of the largest steps first: they take the memory that the others find.
    pub(in crate::runner::ort) fn indices(&self) -> Vec<GraphIndex> {
        let has_long = self.table_widths[1] * self.block_size > SHORT_CONTEXT;
        let contexts = 0..=usize::from(has_long);
        let buckets = (0..=self.last_bucket).rev();
        buckets
            .flat_map(|bucket| contexts.clone().map(move |context| GraphIndex { context, bucket }))
            .collect()
    }

    /// How many graphs there are if contexts may be long.
    pub(in crate::runner::ort) fn max_num_graphs(&self) -> usize {
        2 * (self.last_bucket + 1)
    }

    /// Captures a graph by rows of padding: they write nothing.
    pub(in crate::runner::ort) fn capture(
        &mut self,
        session: &mut Session,
        caches: &[(String, DynTensor)],
        names: &TensorNames,
        index: GraphIndex,
    ) -> ort::Result<()> {
        self.bind(session, caches, names, &StepPlan::default(), index)?;
        self.run(session, index)
    }

    /// Writes a step's inputs. `caches` are bound to a graph that is new.
    pub(in crate::runner::ort) fn bind(
        &mut self,
        session: &Session,
        caches: &[(String, DynTensor)],
        names: &TensorNames,
        plan: &StepPlan,
        index: GraphIndex,
    ) -> ort::Result<()> {
        let graph = match &mut self.graphs[index.context][index.bucket] {
            Some(graph) => graph,
            none => {
                self.num_ids += 1;
                let layout = InputLayout::new(ROWS[index.bucket], self.table_widths[index.context]);
                let bounds = bounds(index.context == 1, layout.table_width * self.block_size);
                let (inputs, outputs) = (&mut self.inputs, &mut self.outputs);
                // SAFETY: graphs are dropped before the memory, with which they live in one struct.
                let graph =
                    unsafe { CudaGraph::new(session, caches, names, layout, bounds, inputs, outputs) }?;
                none.insert(graph.with_id(self.num_ids)?)
            }
        };
        graph.layout.fill(self.host_inputs.slice_mut(0, graph.layout.len), plan);
        let num_bytes = graph.layout.len * size_of::<i32>();
        // SAFETY: the device's memory has room for the largest layout, and the step waits for the stream.
        unsafe { self.stream.upload(&self.host_inputs, num_bytes, self.inputs.as_ptr()) }
    }

    /// Captures or replays, and brings the candidates to the host. This is the step's one wait.
    pub(in crate::runner::ort) fn run(
        &mut self,
        session: &mut Session,
        index: GraphIndex,
    ) -> ort::Result<()> {
        let place = &mut self.graphs[index.context][index.bucket];
        let Some(graph) = place else { return Err(ort::Error::new("nothing is bound")) };
        let mut result = session.run_binding_with_options(&graph.binding, &graph.options).map(drop);
        if let (Ok(()), Some((host, width)), Some(candidates)) =
            (&result, &mut self.host_candidates, self.outputs.candidates())
        {
            let num_bytes = self.outputs.widths().candidate_bytes(graph.layout.rows);
            debug_assert!(*width > 0);
            // SAFETY: the memory has room for the candidates of the largest bucket.
            result = unsafe { self.stream.download(candidates, num_bytes, host) };
        }
        // After a failure too: what was queued may still use the memory.
        let result = result.and(self.stream.wait());
        if result.is_err() {
            *place = None;
        }
        result
    }

    /// Where the last run of a graph wrote its rows.
    pub(in crate::runner::ort) fn rows(&self, index: GraphIndex) -> Option<*const f32> {
        self.graphs[index.context][index.bucket].as_ref().map(|graph| graph.outputs.rows())
    }

    /// The candidates of the first rows that the last run of a graph wrote.
    ///
    /// # Errors
    /// [`RunError`] if there are fewer.
    pub(in crate::runner::ort) fn candidates(
        &self,
        index: GraphIndex,
        num_rows: usize,
    ) -> Result<Option<Candidates<'_>>, RunError> {
        let Some((host, width)) = &self.host_candidates else { return Ok(None) };
        copied_candidates(host, *width, ROWS[index.bucket], num_rows).map(Some)
    }

    /// Run options of steps that are not captured.
    pub(in crate::runner::ort) fn uncaptured(&self) -> &RunOptions {
        &self.uncaptured
    }
}

impl GraphIndex {
    /// `max_kv_lens` are the longest short context and the longest of all. A decode that checks draft tokens has more
    /// than one token and is not captured.
    fn of(plan: &StepPlan, max_kv_lens: [usize; 2]) -> Option<Self> {
        let num_rows = plan.sequences.len();
        let context = usize::from(plan.max_kv_len > SHORT_CONTEXT);
        let fits = plan.max_kv_len <= max_kv_lens[context];
        let bucket = bucket(num_rows)?;
        (plan.max_query_len == 1 && fits).then_some(Self { context, bucket })
    }
}

/// Bounds that hold for every replay: new tokens a sequence, then the longest context from above and below. Kernels
/// take true lengths from the device; the upper bound costs them a few empty blocks and some memory.
fn bounds(is_long: bool, max_kv_len: usize) -> [i32; 3] {
    let (upper, lower) =
        if is_long { (max_kv_len, SHORT_CONTEXT + 1) } else { (max_kv_len.min(SHORT_CONTEXT), 0) };
    [1, upper as i32, lower as i32]
}

impl CudaGraph {
    /// Binds everything once.
    ///
    /// # Safety
    /// It does not run after `inputs` and `outputs` are gone.
    unsafe fn new(
        session: &Session,
        caches: &[(String, DynTensor)],
        names: &TensorNames,
        layout: InputLayout,
        bounds: [i32; 3],
        inputs: &mut Buffer,
        outputs: &mut OutputMemory,
    ) -> ort::Result<Self> {
        let mut binding = session.create_binding()?;
        for (name, cache) in caches {
            binding.bind_input(name, cache)?;
        }
        let rows = layout.rows;
        let tensors: [(&str, &Range<usize>, &[usize]); 6] = [
            (&names.token_ids, &layout.token_ids, &[rows]),
            (&names.cumulative_sequence_length, &layout.cumulative_sequence_length, &[rows + 1]),
            (&names.past_seqlens, &layout.past_seqlens, &[rows]),
            (&names.slot_mapping, &layout.slot_mapping, &[rows]),
            (&names.logits_indices, &layout.logits_indices, &[rows]),
            (&names.block_table, &layout.block_table, &[rows, layout.table_width]),
        ];
        for (name, range, shape) in tensors {
            let offset = range.start * size_of::<i32>();
            // SAFETY: the caller's promise is handed on.
            let tensor = unsafe { inputs.view(offset, TensorElementType::Int32, shape) }?;
            binding.bind_input(name, &tensor)?;
        }
        binding
            .bind_input(&names.attention_metadata, &Tensor::from_array(([bounds.len()], bounds.to_vec()))?)?;
        // SAFETY: as above.
        let outputs = unsafe { outputs.bind(&mut binding, names, rows) }?;
        let mut options = RunOptions::new()?;
        // The step waits once, behind the copy of the candidates.
        options.disable_device_sync()?;
        Ok(Self { binding, options, layout, outputs })
    }

    fn with_id(mut self, id: usize) -> ort::Result<Self> {
        self.options.set(GRAPH_ID, id.to_string())?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::RequestId;

    #[test]
    fn steps_of_one_token_a_sequence_are_captured_and_drafts_are_not() {
        let index = |shares: &[(usize, usize)]| {
            let mut plan = StepPlan::default();
            plan.clear(64);
            for &(start, num_tokens) in shares {
                plan.push(RequestId(0), vec![5; num_tokens], start, &[0; 64], 16, num_tokens);
            }
            GraphIndex::of(&plan, [512, 1024])
        };
        assert_eq!(index(&[(7, 1), (30, 1), (511, 1)]), Some(GraphIndex { context: 0, bucket: 2 }));
        assert_eq!(index(&[(512, 1)]), Some(GraphIndex { context: 1, bucket: 0 }));
        assert_eq!(index(&[(7, 1), (30, 2)]), None);
        assert_eq!(index(&[(7, 9)]), None);
        assert_eq!(index(&[]), None);
        assert_eq!(index(&[(7, 1); 513]), None);
    }

    #[test]
    fn bounds_hold_for_every_replay() {
        assert_eq!(bounds(false, 512), [1, 512, 0]);
        assert_eq!(bounds(false, 64), [1, 64, 0]);
        assert_eq!(bounds(true, 8192), [1, 8192, 513]);
    }
}
