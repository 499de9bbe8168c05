//! Owns one call: quantise the rows, then multiply, cut up for the threads there are.
//!
//! Invariant: cutting never changes bits, since each output is computed whole by one kernel; tasks
//! write disjoint parts of the output.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::activations::{Activations, Tile};
use super::finish::Finish;
use super::kernel::Panel;
use super::packing::{COLUMNS, LINE};
use super::product::Product;
use super::simd::Level;
use crate::operators::parallel::{Guard, Parallel};

/// Rows that a tile of any level holds.
const MAX_ROWS: usize = 32;
/// Below this many values, one thread quantises them all.
const MIN_PARALLEL_VALUES: usize = 1 << 15;
/// Below this many products, waking other threads costs more than they save.
const MIN_PARALLEL_PRODUCTS: usize = 1 << 18;
/// Pieces of work that a thread should find, so that a slow thread does not hold up the others.
const TASKS_PER_THREAD: usize = 4;
/// Bytes of quantised rows that all panels pass by in turn: they are to stay in a core's cache.
const GROUP_BYTES: usize = 512 << 10;
/// How far ahead weights are asked for where each is used once.
const AHEAD: usize = 4096;

/// A call's validated inputs.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) product: Product,
    /// `[rows, k]`.
    pub(super) x: &'a [f32],
    /// `[num_panels, panel bytes]`.
    pub(super) weights: &'a [u8],
    /// `[num_panels, 32]`.
    pub(super) bias: Option<&'a [f32]>,
}

/// Multiplies into `output`, `[rows, width]`.
///
/// # Errors
/// When threads can't be had, or a task panicked: never for validated inputs.
pub(super) fn run<L: Level>(
    level: L,
    call: &Call,
    output: &mut [f32],
    activations: &mut Activations,
    threads: &impl Parallel,
) -> Result<(), String> {
    let Product { k, format, .. } = call.product;
    let rows = call.x.len() / k;
    assert_eq!(output.len(), rows * call.product.width());
    assert_eq!(call.weights.len(), call.product.num_panels() * call.product.panel_bytes());
    activations.reserve(level.tiles(rows, format.block_size), k, format.block_size);

    let guard = Guard::default();
    let num_tiles = activations.tiles().len();
    let writer = activations.writer();
    let quantise = |i: usize| {
        guard.call(&|| {
            // SAFETY: each tile is asked for once.
            let mut tile = unsafe { writer.tile(i) };
            level.quantise(&mut tile, call.x, k, format.block_size);
        });
    };
    if call.x.len() < MIN_PARALLEL_VALUES {
        (0..num_tiles).for_each(quantise);
    } else {
        threads.run(num_tiles, &quantise)?;
    }

    let products = rows * k * call.product.n;
    let num_threads = if products < MIN_PARALLEL_PRODUCTS { 1 } else { threads.num_threads() };
    let cuts = Cuts::new(call.product, activations.tiles(), num_threads);
    let job = Job { call, activations, cuts, output: output.as_mut_ptr() };
    // Workers take tasks as they get to them.
    let next = AtomicUsize::new(0);
    let work = |_: usize| {
        guard.call(&|| {
            loop {
                match next.fetch_add(1, Ordering::Relaxed) {
                    task if task < job.cuts.num_tasks() => job.work(level, task),
                    _ => break,
                }
            }
        });
    };
    match num_threads.min(job.cuts.num_tasks()) {
        1 => work(0),
        num_workers => threads.run(num_workers, &work)?,
    }
    guard.finish()
}

/// How a call is cut: groups of tiles times chunks of panels.
#[derive(Clone, Copy)]
struct Cuts {
    num_tiles: usize,
    num_groups: usize,
    num_panels: usize,
    num_chunks: usize,
}

impl Cuts {
    fn new(product: Product, tiles: &[Tile], num_threads: usize) -> Self {
        let num_panels = product.num_panels();
        let rows: usize = tiles.iter().map(|tile| tile.height).sum();
        let num_groups = (rows * product.k).div_ceil(GROUP_BYTES).clamp(1, tiles.len());
        let wanted = if num_threads == 1 { 1 } else { num_threads * TASKS_PER_THREAD };
        let num_chunks = wanted.div_ceil(num_groups).min(num_panels);
        Self { num_tiles: tiles.len(), num_groups, num_panels, num_chunks }
    }

    fn num_tasks(self) -> usize {
        self.num_groups * self.num_chunks
    }
}

/// What the tasks of a call share.
struct Job<'a> {
    call: &'a Call<'a>,
    activations: &'a Activations,
    cuts: Cuts,
    output: *mut f32,
}

// SAFETY: tasks write disjoint parts of `output`; see `work`.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    /// Does a task: some tiles times some panels.
    fn work<L: Level>(&self, level: L, task: usize) {
        let Cuts { num_tiles, num_groups, num_panels, num_chunks } = self.cuts;
        let (group, chunk) = (task / num_chunks, task % num_chunks);
        let tiles =
            &self.activations.tiles()[group * num_tiles / num_groups..(group + 1) * num_tiles / num_groups];
        let panels = chunk * num_panels / num_chunks..(chunk + 1) * num_panels / num_chunks;
        let product = self.call.product;
        let (bytes, width) = (product.panel_bytes(), product.width());
        let mut sums = [[0.0; COLUMNS]; MAX_ROWS];
        for p in panels {
            let lines = self.call.weights[p * bytes..(p + 1) * bytes].as_chunks::<LINE>().0;
            let what = Finish {
                bits: product.format.bits,
                bias: self.call.bias.map(|bias| &bias.as_chunks().0[p]),
                swiglu: product.swiglu,
            };
            let first = p * product.panel_width();
            let columns = product.panel_width().min(width - first);
            for (i, tile) in tiles.iter().enumerate() {
                // The first of many tiles fetches the next panel for all of them.
                let ahead = match (tiles.len(), i) {
                    (1, _) => AHEAD,
                    (_, 0) => bytes,
                    _ => 0,
                };
                let panel = Panel { lines, format: product.format, ahead };
                level.multiply(tile.height, &panel, &self.activations.tile(*tile), &mut sums);
                let rows = (tile.first..tile.first + tile.rows).map(|row| {
                    // SAFETY: `run` checked that the output holds all rows of this width; tiles have
                    // rows of their own and panels columns, and each pair of them is in one task.
                    unsafe { std::slice::from_raw_parts_mut(self.output.add(row * width + first), columns) }
                });
                level.finish(&mut sums, &what, rows);
            }
        }
    }
}
