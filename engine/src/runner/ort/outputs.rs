//! Owns what a run returns: whole rows where the device leaves them, and the candidates beside them.
//!
//! Invariants: a step of the last one's number of rows takes no new memory; whole rows cross to the host only when
//! they are asked for.

use std::ffi::c_void;

use ndarray::ArrayView2;
use ort::memory::Allocator;
use ort::session::IoBinding;
use ort::value::{DynTensor, TensorElementType};

use super::buffer::{Buffer, align};
use super::cuda::runtime::Pinned;
use super::device_error::failed;
use crate::error::RunError;
use crate::model::manifest::TensorNames;
use crate::step::Candidates;

/// Columns of the graph's outputs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Widths {
    pub(super) logits: usize,
    /// Candidates a row, if the graph returns any.
    pub(super) topk: Option<usize>,
}

impl Widths {
    /// Bytes of the candidates of so many rows.
    pub(super) fn candidate_bytes(self, num_rows: usize) -> usize {
        self.topk.map_or(0, |width| offsets(width, num_rows)[3])
    }
}

/// Memory of as many rows as any step wanted.
#[derive(Debug)]
pub(super) struct OutputMemory {
    widths: Widths,
    num_rows: usize,
    rows: Buffer,
    /// Ids, values and logsumexp of all rows, one behind the other.
    candidates: Option<Buffer>,
}

/// The tensors that a binding writes for a number of rows.
#[derive(Debug)]
pub(super) struct Outputs {
    num_rows: usize,
    rows: *const f32,
    candidates: Option<[DynTensor; 3]>,
}

// SAFETY: the pointer is into memory that the outputs' maker keeps; it belongs to no thread.
unsafe impl Send for Outputs {}

impl OutputMemory {
    /// Room for so many rows of logits in one memory, and for their candidates in another.
    pub(super) fn new(
        rows: Allocator,
        candidates: impl FnOnce() -> ort::Result<Allocator>,
        widths: Widths,
        num_rows: usize,
    ) -> ort::Result<Self> {
        let num_bytes = widths.candidate_bytes(num_rows);
        let candidates = (num_bytes > 0).then(|| Buffer::new(candidates()?, num_bytes)).transpose()?;
        let rows = Buffer::new(rows, num_rows * widths.logits * size_of::<f32>())?;
        Ok(Self { widths, num_rows, rows, candidates })
    }

    /// Rows it has room for.
    pub(super) fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Columns of what is written.
    pub(super) fn widths(&self) -> Widths {
        self.widths
    }

    /// Where the candidates lie.
    pub(super) fn candidates(&mut self) -> Option<*const c_void> {
        self.candidates.as_mut().map(|buffer| buffer.as_ptr().cast_const())
    }

    /// Binds the graph's outputs for exactly `num_rows` rows.
    ///
    /// # Safety
    /// The binding doesn't run, and the outputs aren't read, after the memory is gone.
    pub(super) unsafe fn bind(
        &mut self,
        binding: &mut IoBinding,
        names: &TensorNames,
        num_rows: usize,
    ) -> ort::Result<Outputs> {
        let shape = [num_rows, self.widths.logits];
        // SAFETY: the caller's promise is handed on.
        let mut tensor = unsafe { self.rows.view(0, TensorElementType::Float32, &shape) }?;
        binding.bind_output(names.logits.as_str(), &mut tensor)?;
        let mut outputs = Outputs { num_rows, rows: self.rows.as_ptr().cast(), candidates: None };
        if let (Some(width), Some(names), Some(buffer)) =
            (self.widths.topk, names.topk(), &mut self.candidates)
        {
            // SAFETY: as above.
            let mut views = unsafe { candidate_views(buffer, width, num_rows) }?;
            for (name, tensor) in names.into_iter().zip(&mut views) {
                binding.bind_output(name, tensor)?;
            }
            outputs.candidates = Some(views);
        }
        Ok(outputs)
    }
}

/// Where ids, values and logsumexp start, and where the last ends.
fn offsets(width: usize, num_rows: usize) -> [usize; 4] {
    let column = align(num_rows * width * size_of::<f32>());
    [0, column, 2 * column, 2 * column + align(num_rows * size_of::<f32>())]
}

/// # Safety
/// As [`Buffer::view`].
unsafe fn candidate_views(buffer: &mut Buffer, width: usize, num_rows: usize) -> ort::Result<[DynTensor; 3]> {
    let [ids, values, logsumexp, _] = offsets(width, num_rows);
    // SAFETY: the caller's promise is handed on.
    unsafe {
        Ok([
            buffer.view(ids, TensorElementType::Int32, &[num_rows, width])?,
            buffer.view(values, TensorElementType::Float32, &[num_rows, width])?,
            buffer.view(logsumexp, TensorElementType::Float32, &[num_rows, 1])?,
        ])
    }
}

impl Outputs {
    /// Rows that the binding writes.
    pub(super) fn num_bound_rows(&self) -> usize {
        self.num_rows
    }

    /// Where the rows lie, in the memory of the session's device.
    pub(super) fn rows(&self) -> *const f32 {
        self.rows
    }

    /// The candidates of the first rows, where they were written to memory of the host.
    ///
    /// # Errors
    /// [`RunError`] if fewer were written.
    pub(super) fn candidates(&self, num_rows: usize) -> Result<Option<Candidates<'_>>, RunError> {
        let Some([ids, values, logsumexp]) = &self.candidates else { return Ok(None) };
        let width = ids.shape().last().map_or(0, |&width| width as usize);
        let (_, ids) = ids.try_extract_tensor::<i32>().map_err(failed)?;
        let (_, values) = values.try_extract_tensor::<f32>().map_err(failed)?;
        let (_, logsumexp) = logsumexp.try_extract_tensor::<f32>().map_err(failed)?;
        candidates(ids, values, logsumexp, width, num_rows).map(Some)
    }
}

/// The candidates of the first `num_rows` of `num_written` rows, from a copy of the bytes that a binding wrote.
///
/// # Errors
/// [`RunError`] if it is too short.
pub(super) fn copied_candidates(
    copy: &Pinned,
    width: usize,
    num_written: usize,
    num_rows: usize,
) -> Result<Candidates<'_>, RunError> {
    let [ids, values, logsumexp, _] = offsets(width, num_written);
    let len = num_written * width;
    let (ids, values) = (copy.slice(ids, len), copy.slice(values, len));
    candidates(ids, values, copy.slice(logsumexp, num_written), width, num_rows)
}

fn candidates<'a>(
    ids: &'a [i32],
    values: &'a [f32],
    logsumexp: &'a [f32],
    width: usize,
    num_rows: usize,
) -> Result<Candidates<'a>, RunError> {
    let short = || RunError::new(format!("{num_rows} rows of candidates are wanted, fewer were written"));
    let shape = (num_rows, width);
    let len = num_rows * width;
    let ids = ids.get(..len).and_then(|ids| ArrayView2::from_shape(shape, ids).ok());
    let values = values.get(..len).and_then(|values| ArrayView2::from_shape(shape, values).ok());
    match (ids, values) {
        (Some(ids), Some(values)) if logsumexp.len() >= num_rows => Ok(Candidates { ids, values, logsumexp }),
        _ => Err(short()),
    }
}
