//! Owns what a run returned: whole rows where the device left them, and the candidates beside them.
//!
//! Invariant: rows cross to the host at most once a step, and only when they are asked for.

use ndarray::ArrayView2;
use ort::memory::{AllocationDevice, MemoryInfo};
use ort::session::{IoBinding, SessionOutputs};
use ort::value::{DynTensor, DynValue};

use crate::error::RunError;
use crate::manifest::TensorNames;
use crate::step::{Candidates, FetchLogits, Logits, StepOutput};

/// The outputs of the last run.
#[derive(Debug, Default)]
pub(super) struct Outputs {
    rows: Rows,
    /// Ids, values, logsumexp.
    candidates: Option<[DynValue; 3]>,
}

#[derive(Debug, Default)]
struct Rows {
    device: Option<DynTensor>,
    host: Option<DynTensor>,
    num_rows: usize,
}

/// Asks for new memory for every output: a binding keeps the tensor it returned, and the next step may
/// want another number of rows.
pub(super) fn bind(
    binding: &mut IoBinding,
    names: &TensorNames,
    rows: &MemoryInfo<'_>,
    host: &MemoryInfo<'_>,
) -> ort::Result<()> {
    binding.bind_output_to_device(names.logits.as_str(), rows)?;
    for name in names.topk().into_iter().flatten() {
        binding.bind_output_to_device(name, host)?;
    }
    Ok(())
}

impl Outputs {
    /// Takes what a run returned. A step without wanted rows still asked for one.
    pub(super) fn take(
        outputs: &mut SessionOutputs<'_>,
        names: &TensorNames,
        num_rows: usize,
    ) -> ort::Result<Self> {
        let mut take = |name: &str| {
            outputs.remove(name).ok_or_else(|| ort::Error::new(format!("the graph has no output {name}")))
        };
        let device = Some(take(&names.logits)?.downcast()?);
        let candidates = match names.topk() {
            Some([ids, values, logsumexp]) => Some([take(ids)?, take(values)?, take(logsumexp)?]),
            None => None,
        };
        Ok(Self { rows: Rows { device, host: None, num_rows }, candidates })
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
        let device = self.device.as_ref().ok_or_else(|| RunError("no step has run".into()))?;
        let tensor = if device.memory_info().is_cpu_accessible() {
            device
        } else {
            match &mut self.host {
                Some(host) => host,
                none => none.insert(device.to(AllocationDevice::CPU, 0).map_err(failed)?),
            }
        };
        rows(tensor.try_extract_tensor::<f32>(), self.num_rows)
    }
}

fn failed(error: ort::Error) -> RunError {
    RunError(error.to_string())
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
    view.ok_or_else(|| RunError(format!("{num_rows} rows have shape {shape:?}")))
}
