//! Owns every access to the key and value caches: writing slots and finding the parts of a key tile.
//!
//! To the contract a cache is `[num_blocks, block_size, kv_num_heads, head_dim]`; within a block the
//! order is ours, since nobody else reads it. A head's numbers lie together. Keys are turned so that a
//! vector holds one channel of neighbouring keys, and a few queries keep a whole vector busy:
//!
//! ```text
//! key block    [kv_num_heads][head_dim][block_size]
//! value block  [kv_num_heads][block_size][head_dim]
//! ```
//!
//! AMX multiplies pairs of numbers, of 16 rows at a time. For it each tile's kilobyte lies together, pairs of a
//! key's channels or of two keys' values:
//!
//! ```text
//! key block    [kv_num_heads][block_size / 16][head_dim / 2][16 keys][2]
//! value block  [kv_num_heads][head_dim / 16][block_size / 2][16 channels][2]
//! ```
//!
//! Invariant: addresses come from a validated batch, and a call writes all its slots before it reads
//! any.

use std::ops::Range;

use super::batch::{Batch, Geometry, MAX_HEAD_DIM, Sequence};
use super::element::Element;

/// Keys of a tile. Tiles start at multiples of it in every sequence.
pub(super) const TILE: usize = 128;

/// Keys that lie together in every cache: the smallest block.
pub(super) const RUN: usize = 16;

/// Asks for the line of `at` ahead of its use; any address will do.
#[inline(always)]
pub(super) fn prefetch<E>(at: *const E) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: prefetching is part of the baseline and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Runs of a tile and the next one.
const NUM_RUNS: usize = 2 * TILE / RUN;

/// The two caches of a layer.
#[derive(Clone, Copy)]
pub(super) struct KvCache<E> {
    key: *mut E,
    value: *mut E,
    geometry: Geometry,
    in_tiles: bool,
}

// SAFETY: the pointers are to memory that outlives the call, and no two writes meet: see `new`. That reading
// begins after writing is the caller's to see to.
unsafe impl<E> Sync for KvCache<E> {}

/// Where a head's keys and values of a tile lie, run by run. The second half of the runs are the next tile's, to
/// prefetch them. From there on the order is the head of this file's: for vectors a key's next channel is
/// `block_size` further, and values lie `head_dim` apart.
pub(super) struct Runs<E> {
    /// Channel 0 of each run's first key.
    pub(super) keys: [*const E; NUM_RUNS],
    /// Channel 0 of each run's first value.
    pub(super) values: [*const E; NUM_RUNS],
    pub(super) block_size: usize,
}

impl<E: Element> KvCache<E> {
    /// # Safety
    /// Each pointer is valid for reading and writing `geometry`'s whole cache, of which every element holds
    /// some number, while the value lives; the caches lie apart, and nobody else uses the memory. The value is
    /// used with batches of this geometry, in which no two tokens have one slot. `in_tiles`, which needs a
    /// `head_dim` of whole tiles, is the same in all calls.
    pub(super) unsafe fn new(key: *mut E, value: *mut E, geometry: Geometry, in_tiles: bool) -> Self {
        Self { key, value, geometry, in_tiles }
    }

    /// Whether numbers lie as AMX's tiles want them.
    pub(super) fn in_tiles(&self) -> bool {
        self.in_tiles
    }

    /// Writes keys, rotated, and values of `kv_head` of some tokens of the batch.
    pub(super) fn write(&self, batch: &Batch, kv_head: usize, tokens: Range<usize>) {
        match self.in_tiles {
            true => self.write_in::<true>(batch, kv_head, tokens),
            false => self.write_in::<false>(batch, kv_head, tokens),
        }
    }

    /// As [`Self::write`], in this order.
    fn write_in<const IN_TILES: bool>(&self, batch: &Batch, kv_head: usize, tokens: Range<usize>) {
        let Geometry { num_heads, kv_num_heads, head_dim, block_size, .. } = self.geometry;
        let width = self.geometry.packed_width();
        let mut turned = [0f32; MAX_HEAD_DIM];
        let turned = &mut turned[..head_dim];
        for sequence in batch.sequences() {
            for token in sequence.tokens.start.max(tokens.start)..sequence.tokens.end.min(tokens.end) {
                let Some(slot) = batch.slot(&sequence, token) else {
                    continue;
                };
                let packed = &batch.packed[token * width..(token + 1) * width];
                let key = (num_heads + kv_head) * head_dim;
                let value = key + kv_num_heads * head_dim;
                turned.copy_from_slice(&packed[key..key + head_dim]);
                if let Some(rotary) = &batch.rotary {
                    rotary.rotate(turned, sequence.past + token - sequence.tokens.start);
                }
                let head = self.head(slot / block_size, kv_head);
                let at = slot % block_size;
                let value = &packed[value..value + head_dim];
                // SAFETY: the batch's slots are within the cache. Other threads may be writing other slots and
                // heads, which lie elsewhere; nobody else writes this one: see `new`.
                unsafe {
                    let (key, of_value) = (self.key.add(head), self.value.add(head));
                    match IN_TILES {
                        true => {
                            let key = key.add(at / RUN * RUN * head_dim + at % RUN * 2).cast::<[E; 2]>();
                            for (i, pair) in turned.as_chunks().0.iter().enumerate() {
                                key.add(i * RUN).write(pair.map(E::round));
                            }
                            let of_value = of_value.add(at / 2 * 2 * RUN + at % 2);
                            for (i, channels) in value.as_chunks::<RUN>().0.iter().enumerate() {
                                for (channel, value) in channels.map(E::round).into_iter().enumerate() {
                                    of_value.add(i * RUN * block_size + channel * 2).write(value);
                                }
                            }
                        }
                        false => {
                            for (channel, (turned, value)) in turned.iter().zip(value).enumerate() {
                                key.add(channel * block_size + at).write(E::round(*turned));
                                of_value.add(at * head_dim + channel).write(E::round(*value));
                            }
                        }
                    }
                }
            }
        }
    }

    /// Where `kv_head`'s part of a block starts.
    fn head(&self, block: usize, kv_head: usize) -> usize {
        let Geometry { kv_num_heads, head_dim, block_size, .. } = self.geometry;
        (block * kv_num_heads + kv_head) * block_size * head_dim
    }

    /// Keys and values of `kv_head` from position `start`, a multiple of [`TILE`], on.
    pub(super) fn runs(&self, sequence: &Sequence, start: usize, kv_head: usize) -> Runs<E> {
        let Geometry { block_size, head_dim, .. } = self.geometry;
        // From one position of a run's start to the next.
        let (key_step, value_step) = if self.in_tiles { (head_dim, RUN) } else { (1, head_dim) };
        let mut runs =
            Runs { keys: [self.key.cast_const(); _], values: [self.value.cast_const(); _], block_size };
        for (run, (key, value)) in runs.keys.iter_mut().zip(&mut runs.values).enumerate() {
            let position = start + run * RUN;
            // Past the end the table may name anything. What is read there is hidden: any block will do.
            if position >= sequence.past + sequence.tokens.len() {
                break;
            }
            let block = sequence.blocks[position / block_size];
            let (head, at) = (self.head(block as usize, kv_head), position % block_size);
            *key = key.wrapping_add(head + at * key_step);
            *value = value.wrapping_add(head + at * value_step);
        }
        runs
    }
}
