//! Owns the plan of one step and its outcome: plain data between scheduler, runner and sampler.
//!
//! Invariant: a plan says what to do and changes nothing; counters move only when it is committed.

use std::ops::Range;

use ndarray::{ArrayView2, s};

use crate::error::RunError;
use crate::request::RequestId;

/// One sequence's share of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScheduledSequence {
    /// Whose tokens.
    pub id: RequestId,
    /// Tokens whose keys and values are in the cache already.
    pub num_computed_tokens: usize,
    /// Tokens of this step, at least 1.
    pub num_scheduled_tokens: usize,
    /// First of its rows of the step's output.
    pub logits_row: usize,
    /// Its rows: none if this step doesn't reach the sequence's last token, else one for that token and
    /// one for each draft after it.
    pub num_logits_rows: usize,
}

impl ScheduledSequence {
    /// Its rows of the step's output.
    pub fn logits_rows(&self) -> Range<usize> {
        self.logits_row..self.logits_row + self.num_logits_rows
    }

    /// Tokens at the end of its share that are drafts, not part of the sequence.
    pub fn num_draft_tokens(&self) -> usize {
        self.num_logits_rows.saturating_sub(1)
    }

    /// Tokens of its share that are part of the sequence.
    pub fn num_known_tokens(&self) -> usize {
        self.num_scheduled_tokens - self.num_draft_tokens()
    }
}

/// What a runner is to compute, in the shape the graph takes. Buffers are reused between steps.
#[derive(Debug, Clone, Default)]
pub struct StepPlan {
    /// Sequences in the order of their tokens; B of them.
    pub sequences: Vec<ScheduledSequence>,
    /// Packed token ids, `[T]`.
    pub token_ids: Vec<i32>,
    /// Start of each sequence's tokens, and T at the end: `[B + 1]`.
    pub cumulative_sequence_length: Vec<i32>,
    /// Cached tokens of each sequence, `[B]`.
    pub past_seqlens: Vec<i32>,
    /// Block ids, `[B, max_num_blocks]`, rows padded with 0.
    pub block_table: Vec<i32>,
    /// Width of `block_table`.
    pub max_num_blocks: usize,
    /// Flat cache slot of each token, `[T]`: block id times block size plus offset.
    pub slot_mapping: Vec<i32>,
    /// Indices into the packed tokens whose logits are wanted, `[R]`; may be empty.
    pub logits_indices: Vec<i32>,
    /// Most new tokens of any sequence.
    pub max_query_len: usize,
    /// Longest context (cached and new) of any sequence.
    pub max_kv_len: usize,
}

impl StepPlan {
    /// Empties the plan and keeps its buffers; tables will be `max_num_blocks` wide.
    pub fn clear(&mut self, max_num_blocks: usize) {
        self.sequences.clear();
        self.token_ids.clear();
        self.cumulative_sequence_length.clear();
        self.cumulative_sequence_length.push(0);
        self.past_seqlens.clear();
        self.block_table.clear();
        self.max_num_blocks = max_num_blocks;
        self.slot_mapping.clear();
        self.logits_indices.clear();
        self.max_query_len = 0;
        self.max_kv_len = 0;
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// T: tokens in this step.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// The drafts in the share of the sequence at `index`.
    pub fn drafts(&self, index: usize) -> &[i32] {
        let end = self.cumulative_sequence_length[index + 1] as usize;
        &self.token_ids[end - self.sequences[index].num_draft_tokens()..end]
    }

    /// Adds `tokens`, which start at position `num_computed_tokens` of a sequence that owns `blocks`.
    /// The logits of the last `num_logits_rows` are wanted.
    pub fn push(
        &mut self,
        id: RequestId,
        tokens: impl IntoIterator<Item = u32>,
        num_computed_tokens: usize,
        blocks: &[u32],
        block_size: usize,
        num_logits_rows: usize,
    ) {
        let start = self.token_ids.len();
        self.token_ids.extend(tokens.into_iter().map(|id| id as i32));
        let num_tokens = self.token_ids.len() - start;
        self.slot_mapping.extend((num_computed_tokens..num_computed_tokens + num_tokens).map(|position| {
            (blocks[position / block_size] as usize * block_size + position % block_size) as i32
        }));
        self.cumulative_sequence_length.push(self.token_ids.len() as i32);
        self.past_seqlens.push(num_computed_tokens as i32);
        self.block_table.extend(blocks.iter().map(|&block| block as i32));
        self.block_table.extend(std::iter::repeat_n(0, self.max_num_blocks - blocks.len()));
        let logits_row = self.logits_indices.len();
        let end = self.token_ids.len();
        self.logits_indices.extend((end - num_logits_rows..end).map(|index| index as i32));
        self.max_query_len = self.max_query_len.max(num_tokens);
        self.max_kv_len = self.max_kv_len.max(num_computed_tokens + num_tokens);
        self.sequences.push(ScheduledSequence {
            id,
            num_computed_tokens,
            num_scheduled_tokens: num_tokens,
            logits_row,
            num_logits_rows,
        });
    }
}

/// What a runner computed. Row `i` belongs to `logits_indices[i]` of the plan.
#[derive(Debug)]
pub struct StepOutput<'a> {
    /// The best of each row, if the runner has them at hand.
    pub candidates: Option<Candidates<'a>>,
    /// Whole rows.
    pub logits: Logits<'a>,
}

/// Whole rows of logits, or a way to fetch them: `[R, padded_vocab_size]`.
#[derive(Debug)]
pub enum Logits<'a> {
    /// In memory.
    Here(ArrayView2<'a, f32>),
    /// On a device.
    Elsewhere(&'a mut dyn FetchLogits),
}

/// Brings a step's rows from where they are.
pub trait FetchLogits: std::fmt::Debug {
    /// One row, until another one is asked for.
    ///
    /// # Errors
    /// [`RunError`] if there is no such row or it can't be copied.
    fn fetch_row(&mut self, row: usize) -> Result<&[f32], RunError>;

    /// All rows.
    ///
    /// # Errors
    /// [`RunError`] if they can't be copied.
    fn fetch(&mut self) -> Result<ArrayView2<'_, f32>, RunError>;
}

impl Logits<'_> {
    /// One row, fetched if need be.
    ///
    /// # Errors
    /// [`RunError`] if there is no such row or it can't be copied.
    pub fn row(&mut self, row: usize) -> Result<&[f32], RunError> {
        match self {
            Self::Here(rows) => {
                let num_rows = rows.nrows();
                let found = (row < num_rows).then(|| rows.slice(s![row, ..]).to_slice()).flatten();
                found.ok_or_else(|| {
                    RunError::new(format!("{num_rows} rows were computed, row {row} is missing"))
                })
            }
            Self::Elsewhere(source) => source.fetch_row(row),
        }
    }

    /// All rows, fetched if need be.
    ///
    /// # Errors
    /// [`RunError`] if they can't be copied.
    pub fn rows(&mut self) -> Result<ArrayView2<'_, f32>, RunError> {
        match self {
            Self::Here(rows) => Ok(rows.view()),
            Self::Elsewhere(source) => source.fetch(),
        }
    }
}

/// The best tokens of every row.
#[derive(Debug, Clone, Copy)]
pub struct Candidates<'a> {
    /// Token ids, `[R, K]`.
    pub ids: ArrayView2<'a, i32>,
    /// Their logits, the largest first: `[R, K]`.
    pub values: ArrayView2<'a, f32>,
    /// Logarithm of the sum of exponentials over the vocabulary, `[R]`.
    pub logsumexp: &'a [f32],
}

/// The best tokens of one row.
#[derive(Debug, Clone, Copy)]
pub struct CandidateRow<'a> {
    /// Token ids.
    pub ids: &'a [i32],
    /// Their logits, the largest first.
    pub values: &'a [f32],
    /// Logarithm of the sum of exponentials over the vocabulary.
    pub logsumexp: f32,
}

impl<'a> Candidates<'a> {
    /// The candidates of a row.
    pub fn row(&self, row: usize) -> Option<CandidateRow<'a>> {
        let width = self.ids.ncols();
        let of = row * width..(row + 1) * width;
        Some(CandidateRow {
            ids: self.ids.to_slice()?.get(of.clone())?,
            values: self.values.to_slice()?.get(of)?,
            logsumexp: *self.logsumexp.get(row)?,
        })
    }
}
