//! Owns memory that tensors look into.
//!
//! Invariant: the memory stays where it is as long as the buffer lives. So shapes can change, and inputs can be
//! written, without new memory, and a captured CUDA graph finds everything where it was.

use std::ffi::c_void;

use ort::AsPointer;
use ort::memory::Allocator;
use ort::value::{DynTensor, TensorElementType};

/// What every view starts at a multiple of, in bytes: more than any kernel's loads need.
const ALIGNMENT: usize = 256;

/// Memory on the host or on a device.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: DynTensor,
    allocator: Allocator,
    num_bytes: usize,
}

/// Where the next view starts that lies behind `num_bytes`.
pub(super) fn align(num_bytes: usize) -> usize {
    num_bytes.next_multiple_of(ALIGNMENT)
}

impl Buffer {
    /// `num_bytes` of the allocator's memory, zeroed on the host.
    pub(super) fn new(allocator: Allocator, num_bytes: usize) -> ort::Result<Self> {
        let memory = DynTensor::new(&allocator, TensorElementType::Uint8, [num_bytes])?;
        Ok(Self { memory, allocator, num_bytes })
    }

    /// Where it starts, in the allocator's memory.
    pub(super) fn as_ptr(&mut self) -> *mut c_void {
        self.memory.data_ptr_mut().cast()
    }

    /// A tensor whose elements start `offset` bytes from the buffer's start.
    ///
    /// # Safety
    /// The tensor, and whatever it is bound to, is not used after the buffer is gone.
    pub(super) unsafe fn view(
        &mut self,
        offset: usize,
        element_type: TensorElementType,
        shape: &[usize],
    ) -> ort::Result<DynTensor> {
        let num_bytes = element_type.byte_size(shape.iter().product()).unwrap_or(usize::MAX);
        if offset.checked_add(num_bytes).is_none_or(|end| end > self.num_bytes) {
            return Err(ort::Error::new(format!("{shape:?} at {offset} exceeds {} bytes", self.num_bytes)));
        }
        let mut dims = [0i64; 2];
        let Some(dims) = dims.get_mut(..shape.len()) else {
            return Err(ort::Error::new(format!("{shape:?} has more than two dimensions")));
        };
        dims.iter_mut().zip(shape).for_each(|(dim, &size)| *dim = size as i64);
        let mut value = std::ptr::null_mut();
        // SAFETY: the range lies within the buffer, as was checked; the library copies the shape and takes
        // no ownership of the memory. It sets `value` if it reports no error.
        unsafe {
            let status = (ort::api().CreateTensorWithDataAsOrtValue)(
                self.allocator.memory_info().ptr(),
                self.memory.data_ptr_mut().byte_add(offset),
                num_bytes,
                dims.as_ptr(),
                dims.len(),
                element_type.into(),
                &mut value,
            );
            ort::Error::result_from_status(status)?;
        }
        let value = std::ptr::NonNull::new(value).ok_or_else(|| ort::Error::new("no tensor was made"))?;
        // SAFETY: `value` is a tensor that nobody else owns.
        Ok(unsafe { DynTensor::from_ptr(value, Some(&self.allocator)) })
    }
}
