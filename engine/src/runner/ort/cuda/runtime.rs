//! Owns the calls to CUDA's runtime that ONNX Runtime has none for: how much memory a device has, page-locked memory of
//! the host, copies in the order of a stream, and one wait for all of them.
//!
//! Invariant: the library is the very one that the CUDA provider has loaded, and the stream is the session's, so that a
//! copy is in order with the kernels before and behind it.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use libloading::os::unix::{Library, RTLD_NOW, Symbol};

use super::facts::{DeviceFacts, DeviceMemory};

/// The runtime of the CUDA release that the wheel is built for.
const LIBRARY: &str = "libcudart.so.13";
/// `cudaDevAttrComputeCapabilityMajor` and its minor one.
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
/// `cudaStreamNonBlocking`: not in order with the legacy stream, which nothing here uses.
const NON_BLOCKING: c_uint = 1;

/// Where a copy goes, by CUDA's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
enum Direction {
    HostToDevice = 1,
    DeviceToHost = 2,
}

type Stream = *mut c_void;

/// The functions that are used. Each returns 0 or the number of an error.
struct Functions {
    set_device: Symbol<unsafe extern "C" fn(c_int) -> c_int>,
    memory: Symbol<unsafe extern "C" fn(*mut usize, *mut usize) -> c_int>,
    properties: Symbol<unsafe extern "C" fn(*mut Properties, c_int) -> c_int>,
    attribute: Symbol<unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int>,
    driver_version: Symbol<unsafe extern "C" fn(*mut c_int) -> c_int>,
    create_stream: Symbol<unsafe extern "C" fn(*mut Stream, c_uint) -> c_int>,
    wait: Symbol<unsafe extern "C" fn(Stream) -> c_int>,
    copy: Symbol<unsafe extern "C" fn(*mut c_void, *const c_void, usize, Direction, Stream) -> c_int>,
    allocate: Symbol<unsafe extern "C" fn(*mut *mut c_void, usize) -> c_int>,
    free: Symbol<unsafe extern "C" fn(*mut c_void) -> c_int>,
    words: Symbol<unsafe extern "C" fn(c_int) -> *const c_char>,
    _library: Library,
}

/// What CUDA 13 writes of a device, `cudaDeviceProp`: it begins with the name and the UUID.
#[repr(C, align(8))]
struct Properties {
    name: [u8; 256],
    uuid: [u8; 16],
    /// More than the rest has.
    rest: [u8; 4096 - 272],
}

/// A stream of a device. Cheap to clone; it lasts as long as the process.
#[derive(Clone)]
pub(in crate::runner::ort) struct CudaStream {
    functions: Arc<Functions>,
    stream: Stream,
}

// SAFETY: CUDA's runtime may be called from any thread, and a stream belongs to none.
unsafe impl Send for CudaStream {}

impl std::fmt::Debug for CudaStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("CudaStream").field(&self.stream).finish()
    }
}

impl CudaStream {
    /// A stream of a device. The CUDA provider has to be loaded.
    ///
    /// # Errors
    /// The runtime's words, or that it is not there.
    pub(in crate::runner::ort) fn open(device_id: i32) -> ort::Result<Self> {
        let functions = Arc::new(load().map_err(|error| ort::Error::new(error.to_string()))?);
        let mut stream = ptr::null_mut();
        // SAFETY: the pointer is valid, and the functions have these arguments in CUDA 13.
        unsafe {
            functions.check((functions.set_device)(device_id))?;
            functions.check((functions.create_stream)(&mut stream, NON_BLOCKING))?;
        }
        Ok(Self { functions, stream })
    }

    /// For the provider's options.
    pub(in crate::runner::ort) fn as_ptr(&self) -> *mut () {
        self.stream.cast()
    }

    /// What is known of the device.
    ///
    /// # Errors
    /// The runtime's words.
    pub(in crate::runner::ort) fn facts(&self, device_id: i32) -> ort::Result<DeviceFacts> {
        let functions = &self.functions;
        let mut properties = Properties { name: [0; 256], uuid: [0; 16], rest: [0; 4096 - 272] };
        // SAFETY: there is room for more than CUDA 13 writes.
        functions.check(unsafe { (functions.properties)(&mut properties, device_id) })?;
        let number = |attribute| {
            let mut value = 0;
            // SAFETY: the pointer is valid.
            functions.check(unsafe { (functions.attribute)(&mut value, attribute, device_id) })?;
            Ok::<_, ort::Error>(value)
        };
        let mut driver = 0;
        // SAFETY: as above.
        functions.check(unsafe { (functions.driver_version)(&mut driver) })?;
        let end = properties.name.iter().position(|&byte| byte == 0).unwrap_or(properties.name.len());
        Ok(DeviceFacts {
            name: String::from_utf8_lossy(&properties.name[..end]).into_owned(),
            uuid: properties.uuid,
            capability: (number(CAPABILITY_MAJOR)?, number(CAPABILITY_MINOR)?),
            driver,
            memory: self.memory()?,
        })
    }

    /// Memory of the thread's device, that of [`CudaStream::open`] unless another was chosen since.
    ///
    /// # Errors
    /// The runtime's words.
    pub(in crate::runner::ort) fn memory(&self) -> ort::Result<DeviceMemory> {
        let mut memory = DeviceMemory { free: 0, total: 0 };
        // SAFETY: the pointers are valid.
        self.functions.check(unsafe { (self.functions.memory)(&mut memory.free, &mut memory.total) })?;
        Ok(memory)
    }

    /// Page-locked memory of the host, zeroed.
    ///
    /// # Errors
    /// The runtime's words.
    pub(in crate::runner::ort) fn pinned(&self, num_bytes: usize) -> ort::Result<Pinned> {
        let mut start = ptr::null_mut();
        // SAFETY: the pointer is valid.
        self.functions.check(unsafe { (self.functions.allocate)(&mut start, num_bytes.max(1)) })?;
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| ort::Error::new("no memory was given"))?;
        // SAFETY: so many bytes were given.
        unsafe { start.write_bytes(0, num_bytes) };
        Ok(Pinned { start, num_bytes, functions: Arc::clone(&self.functions) })
    }

    /// Copies the first `num_bytes` to a device behind what was queued before.
    ///
    /// # Errors
    /// The runtime's words.
    ///
    /// # Safety
    /// So many bytes may be written at `to`, on the device, until the stream was waited for.
    pub(in crate::runner::ort) unsafe fn upload(
        &self,
        from: &Pinned,
        num_bytes: usize,
        to: *mut c_void,
    ) -> ort::Result<()> {
        let num_bytes = num_bytes.min(from.num_bytes);
        // SAFETY: of the source as many bytes are there; the rest is the caller's promise.
        unsafe { self.copy(to, from.start.as_ptr().cast(), num_bytes, Direction::HostToDevice) }
    }

    /// Copies `num_bytes` from a device to the start of `to`, behind what was queued before.
    ///
    /// # Errors
    /// The runtime's words.
    ///
    /// # Safety
    /// So many bytes may be read at `from`, on the device, until the stream was waited for.
    pub(in crate::runner::ort) unsafe fn download(
        &self,
        from: *const c_void,
        num_bytes: usize,
        to: &mut Pinned,
    ) -> ort::Result<()> {
        let num_bytes = num_bytes.min(to.num_bytes);
        // SAFETY: at the target there is room for as many; the rest is the caller's promise.
        unsafe { self.copy(to.start.as_ptr().cast(), from, num_bytes, Direction::DeviceToHost) }
    }

    unsafe fn copy(
        &self,
        to: *mut c_void,
        from: *const c_void,
        num_bytes: usize,
        direction: Direction,
    ) -> ort::Result<()> {
        // SAFETY: the caller's promise is handed on.
        let code = unsafe { (self.functions.copy)(to, from, num_bytes, direction, self.stream) };
        self.functions.check(code)
    }

    /// Waits until all that was queued is done.
    ///
    /// # Errors
    /// The runtime's words about anything that was queued.
    pub(in crate::runner::ort) fn wait(&self) -> ort::Result<()> {
        // SAFETY: the stream exists.
        self.functions.check(unsafe { (self.functions.wait)(self.stream) })
    }
}

fn load() -> Result<Functions, libloading::Error> {
    // SAFETY: the provider has loaded the library and run its initialisers; without a provider another error has been
    // said before. The functions have these types in CUDA 13.
    unsafe {
        let library = Library::open(Some(LIBRARY), RTLD_NOW)?;
        Ok(Functions {
            set_device: library.get(b"cudaSetDevice\0")?,
            memory: library.get(b"cudaMemGetInfo\0")?,
            properties: library.get(b"cudaGetDeviceProperties\0")?,
            attribute: library.get(b"cudaDeviceGetAttribute\0")?,
            driver_version: library.get(b"cudaDriverGetVersion\0")?,
            create_stream: library.get(b"cudaStreamCreateWithFlags\0")?,
            wait: library.get(b"cudaStreamSynchronize\0")?,
            copy: library.get(b"cudaMemcpyAsync\0")?,
            allocate: library.get(b"cudaMallocHost\0")?,
            free: library.get(b"cudaFreeHost\0")?,
            words: library.get(b"cudaGetErrorString\0")?,
            _library: library,
        })
    }
}

impl Functions {
    /// An error in the words that ONNX Runtime has for the same, so that they are understood alike.
    fn check(&self, code: c_int) -> ort::Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the function takes any number and returns words that stay.
        let words = unsafe {
            let words = (self.words)(code);
            if words.is_null() { "".into() } else { CStr::from_ptr(words).to_string_lossy() }
        };
        Err(ort::Error::new(format!("CUDA failure {code}: {words}")))
    }
}

/// Page-locked memory of the host: copies to and from a device need no detour.
pub(in crate::runner::ort) struct Pinned {
    start: NonNull<u8>,
    num_bytes: usize,
    functions: Arc<Functions>,
}

// SAFETY: the memory is the process's, and owned.
unsafe impl Send for Pinned {}

impl std::fmt::Debug for Pinned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pinned").field("num_bytes", &self.num_bytes).finish_non_exhaustive()
    }
}

impl Pinned {
    /// `len` elements, `offset` bytes from the start; fewer where the memory ends.
    pub(in crate::runner::ort) fn slice<T: Plain>(&self, offset: usize, len: usize) -> &[T] {
        let len = self.fitting::<T>(offset, len);
        if len == 0 {
            return &[];
        }
        // SAFETY: the range lies inside, is aligned and initialised, and any bits are a value.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset).cast(), len) }
    }

    /// The same, to write.
    pub(in crate::runner::ort) fn slice_mut<T: Plain>(&mut self, offset: usize, len: usize) -> &mut [T] {
        let len = self.fitting::<T>(offset, len);
        if len == 0 {
            return &mut [];
        }
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(offset).cast(), len) }
    }

    fn fitting<T>(&self, offset: usize, len: usize) -> usize {
        // Page-locked memory starts at a page.
        let is_aligned = offset.is_multiple_of(align_of::<T>()) && offset <= self.num_bytes;
        if is_aligned { len.min((self.num_bytes - offset) / size_of::<T>()) } else { 0 }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: the memory was given by the function's counterpart and is used no more.
        unsafe { (self.functions.free)(self.start.as_ptr().cast()) };
    }
}

/// A type of which any bits are a value.
///
/// # Safety
/// So it must be.
pub(in crate::runner::ort) unsafe trait Plain {}
// SAFETY: numbers.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
