//! Owns every access to the key and value caches: writing slots and finding the rows of a key tile.
//!
//! Invariant: addresses come from a validated batch, and a call writes all its slots before it reads
//! any. Cache elements are loaded by [`Rows`] alone, so another element type would change this file
//! and [`super::kernels`]' two loads.

use super::batch::{Batch, Geometry, Sequence};

/// Keys of a tile. Tiles start at multiples of it in every sequence.
pub(super) const TILE: usize = 128;

/// Cache elements in a line of the CPU's caches.
pub(super) const LINE: usize = 16;

/// Asks for the line of `at` ahead of its use; any address will do.
#[inline(always)]
pub(super) fn prefetch(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: prefetching is part of the baseline and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The two caches of a layer, `[num_blocks, block_size, kv_num_heads, head_dim]`.
#[derive(Clone, Copy)]
pub(super) struct KvCache {
    key: *mut f32,
    value: *mut f32,
    geometry: Geometry,
}

// SAFETY: the pointers are to memory that outlives the call, see `new`; `write` and reading are
// ordered by the caller and distinct writers write distinct channels.
unsafe impl Sync for KvCache {}

/// Where the keys (or values) of a tile lie.
pub(super) struct Rows {
    base: *const f32,
    /// Offsets of the tile's runs of neighbouring slots, and of the next tile's first run, to prefetch
    /// it; the smallest blocks make the most runs.
    runs: [usize; TILE / 16 + 1],
    run_len: usize,
    stride: usize,
}

impl KvCache {
    /// # Safety
    /// Both pointers are valid for reading and writing `geometry`'s whole cache while the value
    /// lives, and nobody else uses the memory.
    pub(super) unsafe fn new(key: *mut f32, value: *mut f32, geometry: Geometry) -> Self {
        Self { key, value, geometry }
    }

    /// Writes keys, rotated, and values of `kv_head` of all tokens.
    pub(super) fn write(&self, batch: &Batch, kv_head: usize) {
        let Geometry { num_heads, kv_num_heads, head_dim, .. } = self.geometry;
        let width = self.geometry.packed_width();
        for sequence in batch.sequences() {
            for token in sequence.tokens.clone() {
                let Some(slot) = batch.slot(&sequence, token) else {
                    continue;
                };
                let packed = &batch.packed[token * width..(token + 1) * width];
                let from = (num_heads + kv_head) * head_dim;
                let to = (slot * kv_num_heads + kv_head) * head_dim;
                // SAFETY: the batch's slots are within the cache; channels of other heads, which
                // other threads may be writing, are not part of the slices.
                let (key, value) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(self.key.add(to), head_dim),
                        std::slice::from_raw_parts_mut(self.value.add(to), head_dim),
                    )
                };
                key.copy_from_slice(&packed[from..from + head_dim]);
                let from = from + kv_num_heads * head_dim;
                value.copy_from_slice(&packed[from..from + head_dim]);
                if let Some(rotary) = &batch.rotary {
                    rotary.rotate(key, sequence.past + token - sequence.tokens.start);
                }
            }
        }
    }

    /// Keys and values of `kv_head` from position `start`, a multiple of [`TILE`], on.
    pub(super) fn rows(&self, sequence: &Sequence, start: usize, kv_head: usize) -> (Rows, Rows) {
        let Geometry { block_size, kv_num_heads, head_dim, .. } = self.geometry;
        let run_len = block_size.min(TILE);
        let mut runs = [0; TILE / 16 + 1];
        for (run, offset) in runs.iter_mut().enumerate().take(TILE / run_len + 1) {
            let position = start + run * run_len;
            // Past the end there is nothing to read, and any address will do to prefetch.
            let Some(&block) = sequence.blocks.get(position / block_size) else {
                break;
            };
            let slot = (block as usize).wrapping_mul(block_size).wrapping_add(position % block_size);
            *offset = slot.wrapping_mul(kv_num_heads).wrapping_add(kv_head).wrapping_mul(head_dim);
        }
        let rows =
            |base: *mut f32| Rows { base: base.cast_const(), runs, run_len, stride: kv_num_heads * head_dim };
        (rows(self.key), rows(self.value))
    }
}

impl Rows {
    /// Floats from a key to the next one of the same run.
    #[inline(always)]
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// Keys from `key` on that lie [`Self::stride`] apart; a multiple of 16 if `key` is one.
    #[inline(always)]
    pub(super) fn run(&self, key: usize) -> usize {
        self.run_len - (key & (self.run_len - 1))
    }

    /// The row of `key`, counted from the tile's start.
    #[inline(always)]
    pub(super) fn row(&self, key: usize) -> *const f32 {
        let offset = self.runs[key / self.run_len] + (key & (self.run_len - 1)) * self.stride;
        self.base.wrapping_add(offset)
    }
}
