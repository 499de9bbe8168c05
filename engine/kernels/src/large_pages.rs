//! Owns copies of weights in memory with large pages.
//!
//! ONNX Runtime maps the weights' file, whose pages are small. A decode step reads every weight once, and
//! a virtual machine then spends more time on addresses than on numbers: see `tests/bench/NOTES.md`. So
//! a kernel copies its matrices, when it is made or first runs, and lets the system drop what was mapped.
//!
//! Invariant: what was handed out is never written or freed again while the pages live.

use std::sync::{Arc, Mutex, PoisonError};

/// What large pages are aligned to.
const PAGE: usize = 2 << 20;
/// Bytes that are asked for at a time: many matrices are smaller than a page.
const CHUNK: usize = 64 << 20;
/// What each copy is aligned to: a cache line.
const LINE: usize = 64;

/// Memory for many copies.
#[derive(Debug, Default)]
pub(super) struct LargePages(Mutex<Chunks>);

#[derive(Debug, Default)]
struct Chunks {
    chunks: Vec<Chunk>,
    /// Bytes of the last chunk that are taken.
    used: usize,
}

#[derive(Debug)]
struct Chunk {
    mapping: *mut libc::c_void,
    mapped: usize,
    start: *mut u8,
    len: usize,
}

// SAFETY: the chunk owns its mapping, which any thread may unmap. It hands out no part of it itself.
unsafe impl Send for Chunk {}

/// A copy, and the pages that it lies in.
#[derive(Debug)]
pub(super) struct Copied {
    start: *const u8,
    len: usize,
    _pages: Arc<LargePages>,
}

// SAFETY: `new` wrote it before there was a value; from then on it is only read.
unsafe impl Send for Copied {}
// SAFETY: as above.
unsafe impl Sync for Copied {}

impl Copied {
    /// Copies `bytes` and lets the system drop the pages that they came from, if it can read them again.
    /// None if there is no memory.
    pub(super) fn new(pages: &Arc<LargePages>, bytes: &[u8]) -> Option<Self> {
        let start = pages.0.lock().unwrap_or_else(PoisonError::into_inner).take(bytes.len())?;
        // SAFETY: `take` found room for this much, and gives it away once.
        unsafe { start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        drop_pages(bytes);
        Some(Self { start, len: bytes.len(), _pages: Arc::clone(pages) })
    }
}

impl std::ops::Deref for Copied {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: that much was written, is not written again, and lives as long as the pages do.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl Chunks {
    /// The next `len` bytes.
    fn take(&mut self, len: usize) -> Option<*mut u8> {
        let size = len.next_multiple_of(LINE);
        if self.chunks.last().is_none_or(|chunk| chunk.len - self.used < size) {
            self.chunks.push(Chunk::new(size.max(CHUNK))?);
            self.used = 0;
        }
        let start = self.chunks.last()?.start.wrapping_add(self.used);
        self.used += size;
        Some(start)
    }
}

impl Chunk {
    fn new(len: usize) -> Option<Self> {
        let len = len.next_multiple_of(PAGE);
        let mapped = len + PAGE;
        // SAFETY: new memory at an address of the system's choice.
        let mapping = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), mapped, protection, flags, -1, 0)
        };
        if mapping == libc::MAP_FAILED {
            return None;
        }
        let start = mapping.cast::<u8>().wrapping_add(mapping.cast::<u8>().align_offset(PAGE));
        // SAFETY: within the mapping. The advice may be refused: pages are small then.
        #[cfg(target_os = "linux")]
        unsafe {
            libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE);
        }
        Some(Self { mapping, mapped, start, len })
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; every reader held the pages, and there is none left.
        unsafe { libc::munmap(self.mapping, self.mapped) };
    }
}

/// Tells the system that whole pages of `bytes` are not needed soon. Their content stays: what comes from
/// a file is read again where it is.
fn drop_pages(bytes: &[u8]) {
    #[cfg(target_os = "linux")]
    {
        const SMALL_PAGE: usize = 4096;
        let first = bytes.as_ptr().align_offset(SMALL_PAGE).min(bytes.len());
        let len = (bytes.len() - first) / SMALL_PAGE * SMALL_PAGE;
        // SAFETY: pages keep their content under this advice, whoever else has a part of them.
        unsafe { libc::madvise(bytes[first..].as_ptr().cast_mut().cast(), len, libc::MADV_PAGEOUT) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = bytes;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_lie_side_by_side_and_outlive_their_source() {
        let pages = Arc::new(LargePages::default());
        let sources: Vec<Vec<u8>> = [5, PAGE + 1, CHUNK + 3, 100_000]
            .into_iter()
            .map(|len| (0..len).map(|i| (i % 251) as u8).collect())
            .collect();
        let copies: Vec<Copied> = sources.iter().map(|source| Copied::new(&pages, source).unwrap()).collect();
        drop(pages);
        for (copy, source) in copies.iter().zip(&sources) {
            assert!(**copy == **source);
            assert_eq!(copy.start.align_offset(LINE), 0);
        }
        assert_eq!(copies[1].start.addr() - copies[0].start.addr(), LINE);
    }
}
