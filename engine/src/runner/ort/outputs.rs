//! Owns what a run returns: whole rows where the device leaves them, and the candidates beside them.
//!
//! Invariants: a step of the last one's number of rows takes no new memory; rows cross to the host at most once a
//! step, and only when they are asked for.

use ndarray::ArrayView2;
use ort::memory::{AllocationDevice, Allocator};
use ort::session::IoBinding;
use ort::value::{DynTensor, TensorElementType};

use super::buffer::{Buffer, align};
use super::device_error::is_permanent;
use crate::error::RunError;
use crate::model::manifest::TensorNames;
use crate::step::{Candidates, FetchLogits, Logits, StepOutput};

/// Columns of the graph's outputs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Widths {
    pub(super) logits: usize,
    /// Candidates a row, if the graph returns any.
    pub(super) topk: Option<usize>,
}

/// Memory of as many rows as any step wanted.
#[derive(Debug)]
pub(super) struct OutputMemory {
    widths: Widths,
    num_rows: usize,
    rows: Buffer,
    /// Ids, values and logsumexp of all rows, one behind the other.
    candidates: Option<Buffer>,
    /// The same on the device, from which one copy brings them all.
    source: Option<Buffer>,
}

/// The tensors that a binding writes for a number of rows.
#[derive(Debug)]
pub(super) struct Outputs {
    rows: Rows,
    candidates: Option<[DynTensor; 3]>,
    /// The candidates' bytes on the device and on the host, where the binding writes the former.
    copies: Option<[DynTensor; 2]>,
}

#[derive(Debug)]
struct Rows {
    tensor: DynTensor,
    /// On the host, when it was asked for.
    fetched: Option<DynTensor>,
    /// Of the tensor's rows, those that the step wants.
    num_rows: usize,
}

impl OutputMemory {
    /// Rows lie in `device`'s memory; candidates on the host, to which the library copies them unless
    /// `is_fixed`: then they are written on the device, for a graph of its own that copies nothing.
    pub(super) fn new(
        device: impl Fn() -> ort::Result<Allocator>,
        widths: Widths,
        num_rows: usize,
        is_fixed: bool,
    ) -> ort::Result<Self> {
        let num_bytes = offsets(widths.topk.unwrap_or(0), num_rows)[3];
        let has_candidates = widths.topk.is_some();
        let on_host = has_candidates.then(|| Buffer::new(Allocator::default(), num_bytes)).transpose()?;
        let on_device =
            (has_candidates && is_fixed).then(|| Buffer::new(device()?, num_bytes)).transpose()?;
        let rows = Buffer::new(device()?, num_rows * widths.logits * size_of::<f32>())?;
        Ok(Self { widths, num_rows, rows, candidates: on_host, source: on_device })
    }

    /// Rows it has room for.
    pub(super) fn num_rows(&self) -> usize {
        self.num_rows
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
        let rows = Rows { tensor, fetched: None, num_rows };
        let (Some(width), Some(names), Some(host)) = (self.widths.topk, names.topk(), &mut self.candidates)
        else {
            return Ok(Outputs { rows, candidates: None, copies: None });
        };
        // SAFETY: as above.
        let mut candidates = unsafe { candidate_views(host, width, num_rows) }?;
        let Some(device) = &mut self.source else {
            for (name, tensor) in names.into_iter().zip(&mut candidates) {
                binding.bind_output(name, tensor)?;
            }
            return Ok(Outputs { rows, candidates: Some(candidates), copies: None });
        };
        // SAFETY: as above.
        for (name, mut tensor) in names.into_iter().zip(unsafe { candidate_views(device, width, num_rows) }?)
        {
            binding.bind_output(name, &mut tensor)?;
        }
        let num_bytes = offsets(width, num_rows)[3];
        let bytes = |buffer: &mut Buffer| {
            // SAFETY: as above.
            unsafe { buffer.view(0, TensorElementType::Uint8, &[num_bytes]) }
        };
        let copies = [bytes(device)?, bytes(host)?];
        Ok(Outputs { rows, candidates: Some(candidates), copies: Some(copies) })
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
        self.rows.tensor.shape()[0] as usize
    }

    /// A run of a step that wants the first `num_rows` rows has written the tensors.
    pub(super) fn written(&mut self, num_rows: usize) -> ort::Result<()> {
        self.rows.num_rows = num_rows;
        self.rows.fetched = None;
        match &mut self.copies {
            Some([device, host]) => device.copy_into(host),
            None => Ok(()),
        }
    }

    /// What the engine reads.
    pub(super) fn view(&mut self) -> Result<StepOutput<'_>, RunError> {
        let num_rows = self.rows.num_rows;
        let candidates = match &self.candidates {
            None => None,
            Some([ids, values, logsumexp]) => Some(Candidates {
                ids: rows(ids.try_extract_tensor::<i32>(), num_rows)?,
                values: rows(values.try_extract_tensor::<f32>(), num_rows)?,
                logsumexp: logsumexp.try_extract_tensor::<f32>().map_err(failed)?.1,
            }),
        };
        Ok(StepOutput { candidates, logits: Logits::Elsewhere(&mut self.rows) })
    }
}

impl FetchLogits for Rows {
    fn fetch(&mut self) -> Result<ArrayView2<'_, f32>, RunError> {
        let tensor = if self.tensor.memory_info().is_cpu_accessible() {
            &self.tensor
        } else {
            match &mut self.fetched {
                Some(fetched) => fetched,
                none => none.insert(self.tensor.to(AllocationDevice::CPU, 0).map_err(failed)?),
            }
        };
        rows(tensor.try_extract_tensor::<f32>(), self.num_rows)
    }
}

/// The library's words, and whether they are its last ones.
pub(super) fn failed(error: ort::Error) -> RunError {
    let message = error.to_string();
    RunError { is_permanent: is_permanent(&message), message }
}

/// The first rows of a tensor.
fn rows<'a, T>(
    tensor: ort::Result<(&'a ort::value::Shape, &'a [T])>,
    num_rows: usize,
) -> Result<ArrayView2<'a, T>, RunError> {
    let (shape, values) = tensor.map_err(failed)?;
    let width = shape.last().map_or(0, |&width| width as usize);
    let wanted = values.get(..num_rows * width);
    let view = wanted.and_then(|wanted| ArrayView2::from_shape((num_rows, width), wanted).ok());
    view.ok_or_else(|| RunError::new(format!("{num_rows} rows have shape {shape:?}")))
}
