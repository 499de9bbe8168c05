//! Owns one call: quantise the rows, then multiply, cut up for the threads there are.
//!
//! Invariant: cutting never changes bits, since each output is computed whole by one kernel; tasks
//! write disjoint parts of the output.

use super::activations::{Activations, Shared, TileValues};
use super::finish::Finish;
use super::kernel::Panel;
use super::packing::{COLUMNS, LINE};
use super::product::Product;
use super::simd::Level;
use crate::operators::parallel::{Guard, Parallel, Phase, Stretch};

/// Tiles that a panel is multiplied with at once, and the rows that they hold at any level.
const TILES: usize = 8;
const MAX_ROWS: usize = 16 * TILES;
/// Threads that one product is cut up for: more would wait for memory.
const MAX_THREADS: usize = 64;
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
    let num_groups = (rows * k).div_ceil(GROUP_BYTES).clamp(1, activations.tiles().len().max(1));
    let total = num_groups * call.product.num_panels();
    let num_threads = num_threads.min(MAX_THREADS);
    let stretches = std::array::from_fn(|i| match i < num_threads {
        true => Stretch::new(i * total / num_threads, (i + 1) * total / num_threads),
        false => Stretch::new(0, 0),
    });
    let job = Job { call, output: output.as_mut_ptr(), activations, num_groups, num_threads, stretches };
    let (guard, quantised) = (Guard::default(), Phase::default());
    // Workers take what is to be done as they get to it.
    let work = |worker: usize| {
        quantised.run(job.activations.num_strips(), &guard, |i| {
            // SAFETY: each strip is taken once, and no tile before all of them are done.
            let mut strip = unsafe { job.activations.strip(i) };
            level.quantise(&mut strip, call.x);
        });
        guard.call(&|| job.multiply(level, worker));
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
    output: *mut f32,
    activations: Shared<'a>,
    /// Groups of tiles, which fit a core's cache.
    num_groups: usize,
    num_threads: usize,
    /// Pairs of a group and a panel, by threads.
    stretches: [Stretch; MAX_THREADS],
}

// SAFETY: threads write disjoint parts of `output`; see `multiply_group`.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    /// Multiplies what is `worker`'s, then what others have left: each thread reads one stretch of weights from
    /// one end to the other, and all end together. All rows are quantised by then.
    fn multiply<L: Level>(&self, level: L, worker: usize) {
        const { assert!(L::MAX_ROWS <= MAX_ROWS / TILES) };
        // Sums of few rows are not to cost the clearing of many.
        let (mut few, mut many);
        let sums: &mut [[f32; COLUMNS]] = if self.activations.tiles().len() == 1 {
            few = [[0.0; COLUMNS]; MAX_ROWS / TILES];
            &mut few
        } else {
            many = [[0.0; COLUMNS]; MAX_ROWS];
            &mut many
        };
        while let Some(i) = self.stretches[worker].take_first() {
            self.multiply_group(level, i, sums);
        }
        for stretch in &self.stretches[..self.num_threads] {
            while let Some(i) = stretch.take_last() {
                self.multiply_group(level, i, sums);
            }
        }
    }

    /// Multiplies a group of tiles with a panel: number `i` of all pairs of them. `sums` has room for
    /// [`TILES`] of them, or for the only one.
    fn multiply_group<L: Level>(&self, level: L, i: usize, sums: &mut [[f32; COLUMNS]]) {
        let product = self.call.product;
        let num_tiles = self.activations.tiles().len();
        let (group, p) = (i / product.num_panels(), i % product.num_panels());
        let tiles = group * num_tiles / self.num_groups..(group + 1) * num_tiles / self.num_groups;
        let (bytes, width) = (product.panel_bytes(), product.width());
        let tiles = &self.activations.tiles()[tiles];
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
                // SAFETY: all strips of this call's tiles are quantised and given back: see `run`.
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
