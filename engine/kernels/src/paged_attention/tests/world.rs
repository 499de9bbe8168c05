//! Owns a small world to test in: random sequences, a pool of shuffled blocks, and plain attention
//! in f64 over the same numbers.
//!
//! Invariant: a token's query, key and value depend on the seed, its sequence and its position only,
//! so the same sequence can be computed in any chunks, batch and pool.

use crate::paged_attention::attributes::Attributes;
use crate::paged_attention::batch::{Batch, Inputs, Tensor};
use crate::paged_attention::call;
use crate::paged_attention::element::Element;
use crate::paged_attention::kv_cache::KvCache;
use crate::paged_attention::simd::Simd;
use crate::paged_attention::simd::portable::Floats;
use crate::paged_attention::workspace::Workspace;
use crate::testing::{Random, Threads};

/// A model's attention sizes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) kv_heads: usize,
    pub(super) group: usize,
    pub(super) head_dim: usize,
    /// Half the rotary width; 0 is without rotation.
    pub(super) half: usize,
    pub(super) interleaved: bool,
    pub(super) max_len: usize,
}

impl Shape {
    pub(super) fn attributes(&self) -> Attributes {
        Attributes {
            num_heads: self.kv_heads * self.group,
            kv_num_heads: self.kv_heads,
            scale: None,
            do_rotary: self.half > 0,
            interleaved: self.interleaved,
        }
    }
    pub(super) fn width(&self) -> usize {
        (self.group + 2) * self.kv_heads * self.head_dim
    }
    pub(super) fn random(random: &mut Random, max_len: usize) -> Self {
        let head_dim = random.pick(&[8, 16, 24, 36, 50, 64, 80, 96, 128]);
        Self::of_heads(random, head_dim, max_len)
    }
    /// Any, but for what is given.
    pub(super) fn of_heads(random: &mut Random, head_dim: usize, max_len: usize) -> Self {
        Self {
            kv_heads: random.pick(&[1, 2, 3]),
            group: random.pick(&[1, 2, 3, 5, 8, 16]),
            head_dim,
            half: random.pick(&[0, head_dim / 4, head_dim / 2]),
            interleaved: random.below(2) == 0,
            max_len,
        }
    }
}

/// Tokens of a sequence that one call computes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    pub(super) sequence: usize,
    pub(super) past: usize,
    pub(super) len: usize,
}

/// Sequences, their blocks, and caches.
pub(super) struct World<E = f32> {
    pub(super) seed: u64,
    pub(super) shape: Shape,
    pub(super) block_size: usize,
    pub(super) key: Vec<E>,
    pub(super) value: Vec<E>,
    pub(super) tables: Vec<Vec<i32>>,
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
    workspace: Workspace,
}

/// A call's arguments.
pub(super) struct Call {
    pub(super) query: Vec<f32>,
    pub(super) cumulative: Vec<i32>,
    pub(super) past: Vec<i32>,
    pub(super) table: Vec<i32>,
    pub(super) slots: Option<Vec<i32>>,
}

impl<E: Element> World<E> {
    /// A pool for `num_sequences` of `shape.max_len` tokens, blocks shuffled by `pool_seed`; what no
    /// token was written to is NaN.
    pub(super) fn new(
        seed: u64,
        pool_seed: u64,
        shape: Shape,
        block_size: usize,
        num_sequences: usize,
    ) -> Self {
        let per_sequence = shape.max_len.div_ceil(block_size);
        let num_blocks = per_sequence * num_sequences + 3;
        let mut blocks: Vec<i32> = (0..num_blocks as i32).collect();
        Random(pool_seed).shuffle(&mut blocks);
        let floats = num_blocks * block_size * shape.kv_heads * shape.head_dim;
        let angle =
            |position: usize, i: usize| position as f64 * 10_000f64.powf(-(i as f64) / shape.half as f64);
        let table = |f: fn(f64) -> f64| {
            (0..shape.max_len * shape.half).map(|i| f(angle(i / shape.half, i % shape.half)) as f32).collect()
        };
        Self {
            seed,
            shape,
            block_size,
            key: vec![E::round(f32::NAN); floats],
            value: vec![E::round(f32::NAN); floats],
            tables: blocks.chunks(per_sequence).take(num_sequences).map(<[i32]>::to_vec).collect(),
            cos: table(f64::cos),
            sin: table(f64::sin),
            workspace: Workspace::default(),
        }
    }

    /// A token's packed query, key and value.
    pub(super) fn token(&self, sequence: usize, position: usize) -> Vec<f32> {
        let mut random = Random(self.seed ^ ((sequence as u64) << 32) ^ ((position as u64 + 1) << 8));
        (0..self.shape.width()).map(|_| random.noise()).collect()
    }

    /// The arguments for `shares`.
    pub(super) fn call(&self, shares: &[Share], with_slots: bool) -> Call {
        let mut call = Call {
            query: vec![],
            cumulative: vec![0],
            past: vec![],
            table: vec![],
            slots: with_slots.then(Vec::new),
        };
        for share in shares {
            for position in share.past..share.past + share.len {
                call.query.extend(self.token(share.sequence, position));
                if let Some(slots) = &mut call.slots {
                    slots.push(self.slot(share.sequence, position) as i32);
                }
            }
            call.cumulative.push(call.cumulative.last().unwrap() + share.len as i32);
            call.past.push(share.past as i32);
            call.table.extend(&self.tables[share.sequence]);
        }
        call
    }

    /// Where the caches hold a channel of a slot's key and value.
    pub(super) fn places(&self, slot: usize, head: usize, channel: usize) -> [usize; 2] {
        let (block, at) = (slot / self.block_size, slot % self.block_size);
        let head_dim = self.shape.head_dim;
        let first = (block * self.shape.kv_heads + head) * self.block_size * head_dim;
        [first + channel * self.block_size + at, first + at * head_dim + channel]
    }

    pub(super) fn slot(&self, sequence: usize, position: usize) -> usize {
        self.tables[sequence][position / self.block_size] as usize * self.block_size
            + position % self.block_size
    }

    /// Runs the kernel over the world's caches.
    pub(super) fn run(&mut self, call: &Call, simd: Simd, threads: usize) -> Result<Vec<f32>, String> {
        let (mut key, mut value) = (std::mem::take(&mut self.key), std::mem::take(&mut self.value));
        let output = self.run_over([&mut key, &mut value], call, simd, threads);
        (self.key, self.value) = (key, value);
        output
    }

    /// Runs the kernel over these caches.
    pub(super) fn run_over(
        &mut self,
        [key, value]: [&mut [E]; 2],
        call: &Call,
        simd: Simd,
        threads: usize,
    ) -> Result<Vec<f32>, String> {
        let shape = self.shape;
        let slot_floats = shape.kv_heads * shape.head_dim;
        let cache = [
            (key.len() / slot_floats / self.block_size) as i64,
            self.block_size as i64,
            shape.kv_heads as i64,
            shape.head_dim as i64,
        ];
        let num_tokens = call.query.len() / shape.width();
        let rows = call.past.len();
        let table_shape = [rows as i64, (call.table.len() / rows.max(1)) as i64];
        let table = [shape.max_len as i64, shape.half as i64];
        let rotary = |data| (shape.half > 0).then_some(Tensor { shape: &table, data });
        let query_shape = [num_tokens as i64, shape.width() as i64];
        let (bounds_shape, past_shape) = ([call.cumulative.len() as i64], [rows as i64]);
        let slots_shape = [call.slots.as_ref().map_or(0, Vec::len) as i64];
        let batch = Batch::check(
            &shape.attributes(),
            &Inputs {
                query: Tensor { shape: &query_shape, data: &call.query },
                cumulative_sequence_length: Tensor { shape: &bounds_shape, data: &call.cumulative },
                past_seqlens: Tensor { shape: &past_shape, data: &call.past },
                block_table: Tensor { shape: &table_shape, data: &call.table },
                cos_cache: rotary(&self.cos),
                sin_cache: rotary(&self.sin),
                slot_mapping: call.slots.as_ref().map(|data| Tensor { shape: &slots_shape, data }),
            },
            &cache,
            &cache,
        )?;
        let mut output = vec![f32::NAN; num_tokens * batch.geometry.output_width()];
        let scale = 1.0 / (shape.head_dim as f32).sqrt();
        let in_tiles = simd.wants_tiles::<E>(&batch.geometry);
        // SAFETY: the caches have this shape and are not used otherwise during the call, in which each slot
        // is written once.
        let cache = unsafe { KvCache::new(key.as_mut_ptr(), value.as_mut_ptr(), batch.geometry, in_tiles) };
        let threads = Threads(threads);
        call::run(simd, &batch, cache, scale, &mut output, &mut self.workspace, &threads)?;
        Ok(output)
    }

    /// Runs the kernel on `shares`.
    pub(super) fn step(&mut self, shares: &[Share], simd: Simd, threads: usize) -> Vec<f32> {
        let call = self.call(shares, threads.is_multiple_of(2));
        self.run(&call, simd, threads).unwrap()
    }

    /// A head of a token, rotated by its position: heads count queries, then keys, then values. Keys and values
    /// are what the caches hold of them.
    pub(super) fn head(&self, sequence: usize, position: usize, head: usize) -> Vec<f64> {
        let Shape { kv_heads, group, head_dim, half, interleaved, .. } = self.shape;
        let token = self.token(sequence, position);
        let mut x: Vec<f64> =
            token[head * head_dim..(head + 1) * head_dim].iter().map(|&x| x.into()).collect();
        if head < kv_heads * (group + 1) {
            for i in 0..half {
                let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
                let (cos, sin) =
                    (f64::from(self.cos[position * half + i]), f64::from(self.sin[position * half + i]));
                let (left, right): (f64, f64) = (x[a], x[b]);
                (x[a], x[b]) = (left * cos - right * sin, right * cos + left * sin);
            }
        }
        if head >= kv_heads * group {
            // SAFETY: it loads one element.
            x.iter_mut().for_each(|x| *x = unsafe { E::load(Floats::<1>, &E::round(*x as f32)) }[0].into());
        }
        x
    }

    /// The output of a token by plain attention in f64.
    pub(super) fn expected(&self, sequence: usize, position: usize) -> Vec<f64> {
        let Shape { kv_heads, group, head_dim, .. } = self.shape;
        let mut output = vec![];
        for kv_head in 0..kv_heads {
            let heads = |first: usize| -> Vec<Vec<f64>> {
                (0..=position).map(|p| self.head(sequence, p, first + kv_head)).collect()
            };
            let (keys, values) = (heads(kv_heads * group), heads(kv_heads * (group + 1)));
            for head in 0..group {
                let query = self.head(sequence, position, kv_head * group + head);
                let dot = |key: &Vec<f64>| key.iter().zip(&query).map(|(k, q)| k * q).sum::<f64>();
                let scores: Vec<f64> = keys.iter().map(|key| dot(key) / (head_dim as f64).sqrt()).collect();
                let top = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
                let sum: f64 = weights.iter().sum();
                output.extend(
                    (0..head_dim).map(|c| {
                        weights.iter().zip(&values).map(|(w, value)| w * value[c]).sum::<f64>() / sum
                    }),
                );
            }
        }
        output
    }
}
