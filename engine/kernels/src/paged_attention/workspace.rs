//! Owns scratch memory, shared by the kernels of a domain and kept between calls.
//!
//! Invariant: memory only grows; a call that needs no more than an earlier one allocates nothing.

use std::sync::Mutex;

use super::plan::Plan;

/// Floats of a cache line.
const LINE: usize = 16;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// Floats that start at a cache line.
#[derive(Default)]
struct Buffer(Vec<Line>);

impl Buffer {
    /// The first `num_floats`, after growing to hold them.
    fn reserve(&mut self, num_floats: usize) -> &mut [f32] {
        let lines = num_floats.div_ceil(LINE);
        if self.0.len() < lines {
            self.0.clear();
            self.0.resize(lines, Line([0.0; LINE]));
        }
        // SAFETY: a line is 16 floats without padding, and there are enough of them.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), num_floats) }
    }
}

/// What one worker needs for one tile.
#[derive(Default)]
pub(super) struct Scratch(Buffer);

/// A [`Scratch`] cut up for a tile of `width` rows.
pub(super) struct Parts<'a> {
    /// Queries, `[width][head_dim]`.
    pub(super) query: &'a mut [f32],
    /// What is between the two products, as they like it.
    pub(super) work: &'a mut [f32],
    /// Weighted values so far, `[width][head_dim]`.
    pub(super) output: &'a mut [f32],
    /// Of each row: highest score so far.
    pub(super) top: &'a mut [f32],
    /// Of each row: sum of weights so far.
    pub(super) sum: &'a mut [f32],
    /// Of each row: factor of what there is, when a tile is folded in.
    pub(super) keep: &'a mut [f32],
    /// Of each row: factor of the tile that is folded in.
    pub(super) take: &'a mut [f32],
    /// Of each row: highest score in the tile.
    pub(super) tile_top: &'a mut [f32],
    /// Of each row: sum of weights in the tile.
    pub(super) tile_sum: &'a mut [f32],
    /// Of each row: number of keys in the tile that it sees.
    pub(super) visible: &'a mut [f32],
}

impl Scratch {
    /// Room for a tile of `width` rows and as much for the products; contents are arbitrary.
    pub(super) fn parts(&mut self, width: usize, head_dim: usize, num_work_floats: usize) -> Parts<'_> {
        let row = width.next_multiple_of(LINE);
        let matrix = (head_dim * width).next_multiple_of(LINE);
        let work = num_work_floats.next_multiple_of(LINE);
        let mut rest = self.0.reserve(2 * matrix + work + 7 * row);
        let mut take = |num_floats: usize| {
            let (part, others) = std::mem::take(&mut rest).split_at_mut(num_floats);
            rest = others;
            part
        };
        Parts {
            query: take(matrix),
            work: take(work),
            output: take(matrix),
            top: take(row),
            sum: take(row),
            keep: take(row),
            take: take(row),
            tile_top: take(row),
            tile_sum: take(row),
            visible: take(row),
        }
    }
}

/// Scratch memory of a call.
#[derive(Default)]
pub(super) struct Workspace {
    /// How the call is cut up.
    pub(super) plan: Plan,
    /// One for each worker; a mutex only because threads share the list.
    pub(super) scratches: Vec<Mutex<Scratch>>,
    partials: Buffer,
}

impl Workspace {
    /// Grows to `num_workers` workers and `plan`'s partial results, which it returns.
    pub(super) fn reserve(&mut self, num_workers: usize) -> *mut f32 {
        while self.scratches.len() < num_workers {
            self.scratches.push(Mutex::default());
        }
        self.partials.reserve(self.plan.num_partial_floats()).as_mut_ptr()
    }
}
