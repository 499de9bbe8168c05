//! Owns the validation of a call's inputs.
//!
//! Invariant: whatever passed [`Batch::check`] keeps every later address in bounds: lengths agree,
//! sequences partition the tokens, and each block, slot and position that will be used exists.
//!
//! Not checked: that two tokens have two slots, which is the engine's to see to (every block is written by
//! one table). A batch in which they share one has no meaning, and leaves either one's key there.

use std::ops::Range;

use super::attributes::Attributes;
use super::rope::Rotary;

/// Channels of the largest head.
pub(super) const MAX_HEAD_DIM: usize = 512;

/// A tensor as it arrives: dimensions and elements.
#[derive(Clone, Copy)]
pub(super) struct Tensor<'a, T> {
    pub(super) shape: &'a [i64],
    pub(super) data: &'a [T],
}

/// The inputs of a call, besides the caches.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub(super) query: Tensor<'a, f32>,
    pub(super) cumulative_sequence_length: Tensor<'a, i32>,
    pub(super) past_seqlens: Tensor<'a, i32>,
    pub(super) block_table: Tensor<'a, i32>,
    pub(super) cos_cache: Option<Tensor<'a, f32>>,
    pub(super) sin_cache: Option<Tensor<'a, f32>>,
    pub(super) slot_mapping: Option<Tensor<'a, i32>>,
}

/// Sizes that a call's tensors agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) num_heads: usize,
    pub(super) kv_num_heads: usize,
    pub(super) head_dim: usize,
    pub(super) num_blocks: usize,
    pub(super) block_size: usize,
}

impl Geometry {
    /// Query heads of a key/value head.
    pub(super) fn group(&self) -> usize {
        self.num_heads / self.kv_num_heads
    }

    /// Floats of a token's packed query, key and value.
    pub(super) fn packed_width(&self) -> usize {
        (self.num_heads + 2 * self.kv_num_heads) * self.head_dim
    }

    /// Floats of a token's output.
    pub(super) fn output_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Reads the shape that both caches share.
    fn check(attributes: &Attributes, key_cache: &[i64], value_cache: &[i64]) -> Result<Self, String> {
        let [num_blocks, block_size, kv_num_heads, head_dim] = sizes("key_cache", key_cache)?;
        if value_cache != key_cache {
            return Err(format!("value_cache: shape {value_cache:?} differs from key_cache's {key_cache:?}"));
        }
        if kv_num_heads != attributes.kv_num_heads {
            return Err(format!(
                "key_cache: has {kv_num_heads} heads, kv_num_heads is {}",
                attributes.kv_num_heads
            ));
        }
        if block_size < 16 || !block_size.is_power_of_two() {
            return Err(format!("key_cache: block_size {block_size} is not a power of two of at least 16"));
        }
        if !(1..=MAX_HEAD_DIM).contains(&head_dim) {
            return Err(format!("key_cache: head_size {head_dim} is not between 1 and {MAX_HEAD_DIM}"));
        }
        Ok(Self { num_heads: attributes.num_heads, kv_num_heads, head_dim, num_blocks, block_size })
    }
}

/// A call's validated inputs.
#[derive(Clone, Copy)]
pub(super) struct Batch<'a> {
    pub(super) geometry: Geometry,
    /// Packed queries, keys and values, `[T, packed_width]`.
    pub(super) packed: &'a [f32],
    /// T.
    pub(super) num_tokens: usize,
    pub(super) rotary: Option<Rotary<'a>>,
    cumulative: &'a [i32],
    past: &'a [i32],
    block_table: &'a [i32],
    max_num_blocks: usize,
    slots: Option<&'a [i32]>,
}

/// A sequence's share of a call.
#[derive(Clone)]
pub(super) struct Sequence<'a> {
    /// Its tokens among the packed ones.
    pub(super) tokens: Range<usize>,
    /// Position of its first token.
    pub(super) past: usize,
    /// Blocks of positions 0, block_size, ...
    pub(super) blocks: &'a [i32],
}

impl<'a> Batch<'a> {
    /// Checks `inputs` against each other, the caches' shapes and the attributes.
    ///
    /// # Errors
    /// Names the first input that does not fit and says why.
    pub(super) fn check(
        attributes: &Attributes,
        inputs: &Inputs<'a>,
        key_cache: &[i64],
        value_cache: &[i64],
    ) -> Result<Self, String> {
        let geometry = Geometry::check(attributes, key_cache, value_cache)?;
        let [num_tokens, width] = sizes("query", inputs.query.shape)?;
        if width != geometry.packed_width() {
            return Err(format!(
                "query: is {width} wide, packed query, key and value of key_cache's heads are {}",
                geometry.packed_width()
            ));
        }
        let [past] = sizes("past_seqlens", inputs.past_seqlens.shape)?;
        let [bounds] = sizes("cumulative_sequence_length", inputs.cumulative_sequence_length.shape)?;
        if bounds != past + 1 {
            return Err(format!(
                "cumulative_sequence_length: has {bounds} entries for {past} sequences of past_seqlens"
            ));
        }
        let [rows, max_num_blocks] = sizes("block_table", inputs.block_table.shape)?;
        if rows != past {
            return Err(format!("block_table: has {rows} rows for {past} sequences"));
        }
        if let Some(slots) = inputs.slot_mapping {
            let [slots] = sizes("slot_mapping", slots.shape)?;
            if slots != num_tokens {
                return Err(format!("slot_mapping: has {slots} entries for {num_tokens} tokens"));
            }
        }
        let batch = Self {
            geometry,
            packed: inputs.query.data,
            num_tokens,
            rotary: rotary(attributes, inputs, geometry.head_dim)?,
            cumulative: inputs.cumulative_sequence_length.data,
            past: inputs.past_seqlens.data,
            block_table: inputs.block_table.data,
            max_num_blocks,
            slots: inputs.slot_mapping.map(|slots| slots.data),
        };
        batch.check_values()?;
        Ok(batch)
    }

    fn check_values(&self) -> Result<(), String> {
        let cumulative = self.cumulative;
        if cumulative.first() != Some(&0) {
            return Err(format!("cumulative_sequence_length: starts at {}, not 0", cumulative[0]));
        }
        if let Some(i) = (1..cumulative.len()).find(|&i| cumulative[i] < cumulative[i - 1]) {
            return Err(format!(
                "cumulative_sequence_length: falls from {} to {} at entry {i}",
                cumulative[i - 1],
                cumulative[i]
            ));
        }
        let last = cumulative[cumulative.len() - 1];
        if last as usize != self.num_tokens {
            return Err(format!(
                "cumulative_sequence_length: ends at {last}, query has {} tokens",
                self.num_tokens
            ));
        }
        if let Some(i) = self.past.iter().position(|past| *past < 0) {
            return Err(format!("past_seqlens: entry {i} is {}", self.past[i]));
        }
        let Geometry { num_blocks, block_size, .. } = self.geometry;
        for (i, sequence) in self.sequences().enumerate().filter(|(_, s)| !s.tokens.is_empty()) {
            let context = sequence.past + sequence.tokens.len();
            let used = context.div_ceil(block_size);
            let Some(blocks) = sequence.blocks.get(..used) else {
                return Err(format!(
                    "block_table: sequence {i} of {context} tokens needs {used} blocks, the table has {}",
                    self.max_num_blocks
                ));
            };
            if let Some(bad) = blocks.iter().find(|&&block| block < 0 || block as usize >= num_blocks) {
                return Err(format!(
                    "block_table: sequence {i} names block {bad}, key_cache has {num_blocks}"
                ));
            }
            if let Some(rotary) = &self.rotary
                && context > rotary.num_positions()
            {
                return Err(format!(
                    "cos_cache: has {} positions, sequence {i} reaches {context}",
                    rotary.num_positions()
                ));
            }
        }
        let num_slots = num_blocks * block_size;
        if let Some(slots) = self.slots
            && let Some(i) =
                slots.iter().position(|&slot| slot < -1 || (slot >= 0 && slot as usize >= num_slots))
        {
            return Err(format!(
                "slot_mapping: token {i} names slot {}, key_cache has {num_slots}",
                slots[i]
            ));
        }
        Ok(())
    }

    /// Number of sequences, those without tokens included.
    pub(super) fn num_sequences(&self) -> usize {
        self.past.len()
    }

    /// Sequence `i`.
    pub(super) fn sequence(&self, i: usize) -> Sequence<'a> {
        Sequence {
            tokens: self.cumulative[i] as usize..self.cumulative[i + 1] as usize,
            past: self.past[i] as usize,
            blocks: &self.block_table[i * self.max_num_blocks..(i + 1) * self.max_num_blocks],
        }
    }

    /// All sequences.
    pub(super) fn sequences(&self) -> impl Iterator<Item = Sequence<'a>> {
        let batch = *self;
        (0..self.num_sequences()).map(move |i| batch.sequence(i))
    }

    /// Slot where `token` of `sequence` goes; none if it is not to be written.
    pub(super) fn slot(&self, sequence: &Sequence, token: usize) -> Option<usize> {
        match self.slots {
            Some(slots) => usize::try_from(slots[token]).ok(),
            None => {
                let block_size = self.geometry.block_size;
                let position = sequence.past + token - sequence.tokens.start;
                Some(sequence.blocks[position / block_size] as usize * block_size + position % block_size)
            }
        }
    }
}

/// The dimensions of an input that must have `N` of them.
fn sizes<const N: usize>(name: &str, shape: &[i64]) -> Result<[usize; N], String> {
    let wrong = || format!("{name}: shape {shape:?} does not have {N} dimensions");
    let shape: [i64; N] = shape.try_into().map_err(|_| wrong())?;
    let mut sizes = [0; N];
    for (to, from) in sizes.iter_mut().zip(shape) {
        *to = usize::try_from(from).map_err(|_| wrong())?;
    }
    Ok(sizes)
}

fn rotary<'a>(
    attributes: &Attributes,
    inputs: &Inputs<'a>,
    head_dim: usize,
) -> Result<Option<Rotary<'a>>, String> {
    if !attributes.do_rotary {
        return Ok(None);
    }
    let cos = inputs.cos_cache.ok_or("cos_cache: is absent, but do_rotary is 1")?;
    let sin = inputs.sin_cache.ok_or("sin_cache: is absent, but do_rotary is 1")?;
    let [_, half] = sizes("cos_cache", cos.shape)?;
    if sin.shape != cos.shape {
        return Err(format!("sin_cache: shape {:?} differs from cos_cache's {:?}", sin.shape, cos.shape));
    }
    if half == 0 || 2 * half > head_dim {
        return Err(format!("cos_cache: width {half} does not fit head_size {head_dim}"));
    }
    Ok(Some(Rotary { cos: cos.data, sin: sin.data, half, interleaved: attributes.interleaved }))
}
