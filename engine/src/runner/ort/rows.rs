//! Owns the way of whole rows of logits to the host.
//!
//! Invariant: a row crosses when it is asked for, and no other one with it: on a GPU a row of a large vocabulary takes
//! longer to copy than all candidates of a step.

use ndarray::ArrayView2;

use super::cuda::runtime::{CudaStream, Pinned};
use super::device_error::failed;
use crate::error::RunError;
use crate::step::FetchLogits;

/// The rows of the step that has run.
#[derive(Debug)]
pub(super) struct Rows {
    width: usize,
    start: *const f32,
    num_rows: usize,
    /// None where the rows are in memory of the host.
    remote: Option<Remote>,
    /// All rows, where they were asked for.
    all: Vec<f32>,
}

/// What is needed of rows on a GPU.
#[derive(Debug)]
struct Remote {
    stream: CudaStream,
    /// One row.
    row: Pinned,
}

// SAFETY: the pointer is into memory of the runner that owns this; it belongs to no thread.
unsafe impl Send for Rows {}

impl Rows {
    /// Rows of so many columns, on the GPU of the stream or on the host.
    ///
    /// # Errors
    /// There is no memory.
    pub(super) fn new(width: usize, stream: Option<&CudaStream>) -> ort::Result<Self> {
        let remote = |stream: &CudaStream| {
            let row = stream.pinned(width * size_of::<f32>())?;
            Ok::<_, ort::Error>(Remote { stream: stream.clone(), row })
        };
        let remote = stream.map(remote).transpose()?;
        Ok(Self { width, start: std::ptr::null(), num_rows: 0, remote, all: Vec::new() })
    }

    /// The rows lie there now.
    ///
    /// # Safety
    /// So many rows may be read there, in the memory that was named, until they lie elsewhere.
    pub(super) unsafe fn set(&mut self, start: *const f32, num_rows: usize) {
        (self.start, self.num_rows) = (start, num_rows);
    }
}

impl Remote {
    /// Brings so many values to the host.
    ///
    /// # Safety
    /// They may be read on the device.
    unsafe fn copy(&mut self, start: *const f32, width: usize) -> Result<&[f32], RunError> {
        // SAFETY: the caller's promise, which holds until the stream was waited for.
        let copied = unsafe { self.stream.download(start.cast(), width * size_of::<f32>(), &mut self.row) };
        copied.and_then(|()| self.stream.wait()).map_err(failed)?;
        Ok(self.row.slice(0, width))
    }
}

impl FetchLogits for Rows {
    fn fetch_row(&mut self, row: usize) -> Result<&[f32], RunError> {
        let (width, num_rows) = (self.width, self.num_rows);
        if row >= num_rows {
            return Err(RunError::new(format!("{num_rows} rows were computed, row {row} is missing")));
        }
        // SAFETY: the row is one of those that may be read, where `remote` says.
        unsafe {
            let start = self.start.add(row * width);
            match &mut self.remote {
                Some(remote) => remote.copy(start, width),
                None => Ok(std::slice::from_raw_parts(start, width)),
            }
        }
    }

    fn fetch(&mut self) -> Result<ArrayView2<'_, f32>, RunError> {
        let mut all = Vec::with_capacity(self.num_rows * self.width);
        for row in 0..self.num_rows {
            all.extend_from_slice(self.fetch_row(row)?);
        }
        self.all = all;
        ArrayView2::from_shape((self.num_rows, self.width), &self.all)
            .map_err(|error| RunError::new(error.to_string()))
    }
}
