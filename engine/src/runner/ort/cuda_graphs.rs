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

use super::buffer::{Buffer, align};
use super::outputs::{OutputMemory, Outputs, Widths};
use crate::model::manifest::TensorNames;
use crate::step::StepPlan;

/// Buckets of 1, 2, 4 … rows.
const NUM_BUCKETS: usize = 9;
pub(super) const MAX_ROWS: usize = 1 << (NUM_BUCKETS - 1);

/// Contexts up to this are not split among processors by the library's attention (1.31.1,
/// `kFlashSplitKvMinSequenceLength`). The bounds that it chooses by are frozen in a graph, so that short and long
/// contexts have graphs of their own: a long one that was not split would leave most of the device idle.
const SHORT_CONTEXT: usize = 512;

/// Run option of the library: which graph to capture or replay.
const GRAPH_ID: &str = "gpu_graph_id";

/// All graphs of a session.
pub(super) struct CudaGraphs {
    /// By [`GraphIndex::context`] and bucket.
    graphs: [[Option<CudaGraph>; NUM_BUCKETS]; 2],
    num_ids: usize,
    block_size: usize,
    /// Widths of the block tables: short contexts', long ones'.
    table_widths: [usize; 2],
    inputs: Buffer,
    outputs: OutputMemory,
    /// For all other steps.
    uncaptured: RunOptions,
}

/// One captured step.
struct CudaGraph {
    binding: IoBinding,
    options: RunOptions,
    layout: InputLayout,
    /// All inputs of the device, one behind the other, on the host and there.
    host: Tensor<i32>,
    device: DynTensor,
    outputs: Outputs,
}

/// Which graph a step uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GraphIndex {
    /// 0 if all contexts are short, else 1.
    context: usize,
    /// Binary logarithm of the rows.
    bucket: usize,
}

impl std::fmt::Debug for CudaGraphs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaGraphs").field("num_ids", &self.num_ids).finish_non_exhaustive()
    }
}

impl CudaGraphs {
    /// Takes the memory. No sequence is longer than `max_num_blocks` blocks.
    pub(super) fn new(
        device: impl Fn() -> ort::Result<Allocator>,
        widths: Widths,
        block_size: usize,
        max_num_blocks: usize,
    ) -> ort::Result<Self> {
        let table_widths = [SHORT_CONTEXT.div_ceil(block_size).min(max_num_blocks), max_num_blocks];
        let num_inputs = InputLayout::new(MAX_ROWS, max_num_blocks).len;
        let mut uncaptured = RunOptions::new()?;
        uncaptured.set(GRAPH_ID, "-1")?;
        Ok(Self {
            graphs: Default::default(),
            num_ids: 0,
            block_size,
            table_widths,
            inputs: Buffer::new(device()?, num_inputs * size_of::<i32>())?,
            outputs: OutputMemory::new(device, widths, MAX_ROWS, true)?,
            uncaptured,
        })
    }

    /// The graph of a step, unless it is one that is not captured.
    pub(super) fn find(&self, plan: &StepPlan) -> Option<GraphIndex> {
        GraphIndex::of(plan, self.table_widths.map(|width| width * self.block_size))
    }

    /// Captures what steps of up to `max_num_seqs` sequences, [`MAX_ROWS`] at most, need, by rows of padding: they
    /// write nothing.
    pub(super) fn capture(
        &mut self,
        session: &mut Session,
        caches: &[(String, DynTensor)],
        names: &TensorNames,
        max_num_seqs: usize,
    ) -> ort::Result<()> {
        let has_long = self.table_widths[1] * self.block_size > SHORT_CONTEXT;
        let last = max_num_seqs.max(1).next_power_of_two().ilog2() as usize;
        // The largest first: it takes the memory that the others find.
        for bucket in (0..=last).rev() {
            for context in 0..=usize::from(has_long) {
                let index = GraphIndex { context, bucket };
                self.bind(session, caches, names, &StepPlan::default(), index)?;
                self.run(session, index, 1)?;
            }
        }
        Ok(())
    }

    /// Writes a step's inputs. `caches` are bound to a graph that is new.
    pub(super) fn bind(
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
                let rows = 1 << index.bucket;
                let layout = InputLayout::new(rows, self.table_widths[index.context]);
                let bounds = bounds(index.context == 1, layout.table_width * self.block_size);
                // SAFETY: graphs are dropped before the memory, with which they live in one struct.
                let graph = unsafe {
                    CudaGraph::new(
                        session,
                        caches,
                        names,
                        layout,
                        bounds,
                        &mut self.inputs,
                        &mut self.outputs,
                    )
                }?;
                none.insert(graph.with_id(self.num_ids)?)
            }
        };
        graph.layout.fill(graph.host.extract_tensor_mut().1, plan);
        // Waits until the copy is done: the session has a stream of its own.
        graph.host.upcast_ref().copy_into(&mut graph.device)
    }

    /// Captures or replays.
    pub(super) fn run(
        &mut self,
        session: &mut Session,
        index: GraphIndex,
        num_rows: usize,
    ) -> ort::Result<()> {
        let place = &mut self.graphs[index.context][index.bucket];
        let Some(graph) = place else { return Err(ort::Error::new("nothing is bound")) };
        let result = session.run_binding_with_options(&graph.binding, &graph.options).map(drop);
        let result = result.and_then(|()| graph.outputs.written(num_rows));
        if result.is_err() {
            *place = None;
        }
        result
    }

    /// What the last run of a graph wrote.
    pub(super) fn outputs(&mut self, index: GraphIndex) -> Option<&mut Outputs> {
        self.graphs[index.context][index.bucket].as_mut().map(|graph| &mut graph.outputs)
    }

    /// Run options of steps that are not captured.
    pub(super) fn uncaptured(&self) -> &RunOptions {
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
        let is_decode = plan.max_query_len == 1 && (1..=MAX_ROWS).contains(&num_rows) && fits;
        is_decode.then(|| Self { context, bucket: num_rows.next_power_of_two().ilog2() as usize })
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
        let host = Tensor::from_array(([layout.len], vec![0; layout.len]))?;
        // SAFETY: as above.
        let device = unsafe { inputs.view(0, TensorElementType::Int32, &[layout.len]) }?;
        // SAFETY: as above.
        let outputs = unsafe { outputs.bind(&mut binding, names, rows) }?;
        Ok(Self { binding, options: RunOptions::new()?, layout, host, device, outputs })
    }

    fn with_id(mut self, id: usize) -> ort::Result<Self> {
        self.options.set(GRAPH_ID, id.to_string())?;
        Ok(self)
    }
}

/// Where the inputs of a padded step lie among one another, in elements.
#[derive(Debug)]
struct InputLayout {
    rows: usize,
    table_width: usize,
    token_ids: Range<usize>,
    cumulative_sequence_length: Range<usize>,
    past_seqlens: Range<usize>,
    slot_mapping: Range<usize>,
    logits_indices: Range<usize>,
    block_table: Range<usize>,
    len: usize,
}

impl InputLayout {
    fn new(rows: usize, table_width: usize) -> Self {
        let mut len = 0;
        let mut take = |size: usize| {
            let range = len..len + size;
            len += align(size * size_of::<i32>()) / size_of::<i32>();
            range
        };
        Self {
            rows,
            table_width,
            token_ids: take(rows),
            cumulative_sequence_length: take(rows + 1),
            past_seqlens: take(rows),
            slot_mapping: take(rows),
            logits_indices: take(rows),
            block_table: take(rows * table_width),
            len,
        }
    }

    /// Writes a decode step and pads it: rows that write nothing, read one slot of block 0 and are read by nobody.
    fn fill(&self, packed: &mut [i32], plan: &StepPlan) {
        let mut fill = |range: &Range<usize>, values: &[i32], padding: i32| {
            let (used, rest) = packed[range.clone()].split_at_mut(values.len());
            used.copy_from_slice(values);
            rest.fill(padding);
        };
        fill(&self.token_ids, &plan.token_ids, 0);
        fill(&self.past_seqlens, &plan.past_seqlens, 0);
        fill(&self.slot_mapping, &plan.slot_mapping, -1);
        fill(&self.logits_indices, &plan.logits_indices, 0);
        packed[self.cumulative_sequence_length.clone()].iter_mut().zip(0..).for_each(|(sum, row)| *sum = row);
        let table = &mut packed[self.block_table.clone()];
        let width = plan.max_num_blocks.min(self.table_width);
        table.fill(0);
        let rows = table
            .chunks_exact_mut(self.table_width)
            .zip(plan.block_table.chunks_exact(plan.max_num_blocks.max(1)));
        rows.for_each(|(row, blocks)| row[..width].copy_from_slice(&blocks[..width]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::RequestId;

    #[test]
    fn a_padded_step_reads_and_writes_what_the_step_would() {
        let mut plan = StepPlan::default();
        plan.clear(6);
        plan.push(RequestId(1), [11], 33, &[7, 3, 4], 16, 1);
        plan.push(RequestId(2), [12], 0, &[9], 16, 0);
        plan.push(RequestId(3), [13], 15, &[5], 16, 1);
        let layout = InputLayout::new(4, 3);
        // What an earlier step left.
        let mut packed = vec![77; layout.len];
        layout.fill(&mut packed, &plan);
        assert_eq!(packed[layout.token_ids.clone()], [11, 12, 13, 0]);
        assert_eq!(packed[layout.cumulative_sequence_length.clone()], [0, 1, 2, 3, 4]);
        assert_eq!(packed[layout.past_seqlens.clone()], [33, 0, 15, 0]);
        assert_eq!(packed[layout.slot_mapping.clone()], [4 * 16 + 1, 9 * 16, 5 * 16 + 15, -1]);
        assert_eq!(packed[layout.logits_indices.clone()], [0, 2, 0, 0]);
        assert_eq!(packed[layout.block_table.clone()], [7, 3, 4, 9, 0, 0, 5, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn steps_of_one_token_a_sequence_are_captured_and_guesses_are_not() {
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
        assert_eq!(index(&[(7, 1); MAX_ROWS + 1]), None);
    }

    #[test]
    fn inputs_do_not_overlap_and_are_aligned() {
        for (rows, table_width) in [(1, 1), (2, 64), (64, 5), (256, 1024)] {
            let layout = InputLayout::new(rows, table_width);
            let ranges = [
                &layout.token_ids,
                &layout.cumulative_sequence_length,
                &layout.past_seqlens,
                &layout.slot_mapping,
                &layout.logits_indices,
                &layout.block_table,
            ];
            for pair in ranges.windows(2) {
                assert!(pair[0].end <= pair[1].start, "{layout:?}");
            }
            assert!(ranges.iter().all(|range| range.start % 64 == 0), "{layout:?}");
            assert!(layout.block_table.end <= layout.len, "{layout:?}");
        }
    }

    #[test]
    fn bounds_hold_for_every_replay() {
        assert_eq!(bounds(false, 512), [1, 512, 0]);
        assert_eq!(bounds(false, 64), [1, 64, 0]);
        assert_eq!(bounds(true, 8192), [1, 8192, 513]);
    }
}
