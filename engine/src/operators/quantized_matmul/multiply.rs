//! Owns one call: quantise the rows, then multiply, cut up for the threads there are.
//!
//! Invariant: cutting never changes bits, since each output is computed whole by one kernel; tasks
//! write disjoint parts of the output.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::activations::{Activations, Shared, TileValues};
use super::finish::Finish;
use super::kernel::Panel;
use super::packing::{COLUMNS, LINE};
use super::product::Product;
use super::simd::Level;
use crate::operators::parallel::{Guard, Parallel, Phase};

/// Tiles that a panel is multiplied with at once, and the rows that they hold at any level.
const TILES: usize = 8;
const MAX_ROWS: usize = 16 * TILES;
/// Below this many products, waking other threads costs more than they save.
const MIN_PARALLEL_PRODUCTS: usize = 1 << 18;
/// Bytes of quantised rows that all panels pass by in turn: they are to stay in a core's cache.
const GROUP_BYTES: usize = 512 << 10;
/// How far ahead weights are asked for, where they are used first.
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
    activations.reserve(level.tiles(rows), k, format.block_size);

    let products = rows * k * call.product.n;
    let num_threads = if products < MIN_PARALLEL_PRODUCTS { 1 } else { threads.num_threads() };
    let activations = activations.share();
    let job = Job { call, num_threads, output: output.as_mut_ptr(), activations, taken: AtomicUsize::new(0) };
    let (guard, quantised) = (Guard::default(), Phase::default());
    // Workers take what is to be done as they get to it.
    let work = |_: usize| {
        quantised.run(job.activations.num_strips(), &guard, |i| {
            // SAFETY: each strip is taken once.
            let mut strip = unsafe { job.activations.strip(i) };
            level.quantise(&mut strip, call.x);
        });
        guard.call(&|| job.multiply(level));
    };
    match num_threads {
        1 => work(0),
        _ => threads.run(num_threads, &work)?,
    }
    guard.finish()
}

/// What the threads of a call share.
struct Job<'a> {
    call: &'a Call<'a>,
    num_threads: usize,
    output: *mut f32,
    activations: Shared<'a>,
    /// Panels, of all groups, that threads took.
    taken: AtomicUsize,
}

// SAFETY: threads write disjoint parts of `output`; see `multiply_group`.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    /// Multiplies until all is done: large parts first, so that threads read long stretches of weights,
    /// then small ones, so that they end together. All rows are quantised by then.
    fn multiply<L: Level>(&self, level: L) {
        let product = self.call.product;
        let (num_panels, num_tiles) = (product.num_panels(), self.activations.tiles().len());
        let rows = self.call.x.len() / product.k;
        let num_groups = (rows * product.k).div_ceil(GROUP_BYTES).clamp(1, num_tiles);
        let total = num_groups * num_panels;
        let part = |taken: usize| ((total - taken) / (2 * self.num_threads)).max(1);
        let take = |taken: usize| (taken < total).then(|| taken + part(taken));
        while let Ok(start) = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            let end = start + part(start);
            for group in start / num_panels..end.div_ceil(num_panels) {
                let first = group * num_panels;
                let panels = start.max(first) - first..end.min(first + num_panels) - first;
                let tiles = group * num_tiles / num_groups..(group + 1) * num_tiles / num_groups;
                self.multiply_group(level, tiles, panels);
            }
        }
    }

    /// Multiplies some tiles with some panels.
    fn multiply_group<L: Level>(&self, level: L, tiles: Range<usize>, panels: Range<usize>) {
        let product = self.call.product;
        let (bytes, width) = (product.panel_bytes(), product.width());
        const { assert!(L::MAX_ROWS <= MAX_ROWS / TILES) };
        // Sums of few rows are not to cost the clearing of many.
        let (mut few, mut many);
        let sums: &mut [[f32; COLUMNS]] = if tiles.len() == 1 {
            few = [[0.0; COLUMNS]; MAX_ROWS / TILES];
            &mut few
        } else {
            many = [[0.0; COLUMNS]; MAX_ROWS];
            &mut many
        };
        let tiles = &self.activations.tiles()[tiles];
        for p in panels {
            let lines = self.call.weights[p * bytes..(p + 1) * bytes].as_chunks::<LINE>().0;
            let what = Finish {
                bits: product.format.bits,
                bias: self.call.bias.map(|bias| &bias.as_chunks().0[p]),
                swiglu: product.swiglu,
            };
            let first = p * product.panel_width();
            let columns = product.panel_width().min(width - first);
            for (i, tiles) in tiles.chunks(TILES).enumerate() {
                let first_row = tiles[0].first;
                let num_rows: usize = tiles.iter().map(|tile| tile.rows).sum();
                let mut content = [TileValues::default(); TILES];
                for (content, tile) in content.iter_mut().zip(tiles) {
                    // SAFETY: all strips are quantised.
                    *content = unsafe { self.activations.tile(*tile) };
                }
                let sums = &mut sums[..num_rows];
                for row in first_row..first_row + num_rows {
                    level.prefetch_write(self.output.wrapping_add(row * width + first), columns);
                }
                let panel = Panel { lines, format: product.format, ahead: if i == 0 { AHEAD } else { 0 } };
                level.multiply(&panel, &content[..tiles.len()], sums);
                let rows = (first_row..first_row + num_rows).map(|row| {
                    // SAFETY: `run` checked that the output holds all rows of this width; tiles have
                    // rows of their own and panels columns, and each pair of them is taken once.
                    unsafe { std::slice::from_raw_parts_mut(self.output.add(row * width + first), columns) }
                });
                level.finish(sums, &what, rows);
            }
        }
    }
}
