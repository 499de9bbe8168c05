//! Owns a run of one product or of several, each of which waits for the one before: quantise the rows, then
//! multiply, cut up for the threads there are. Threads are called once for all of them.
//!
//! Invariant: cutting never changes bits, since each output is computed whole by one kernel; tasks
//! write disjoint parts of the output.

use std::marker::PhantomData;

use super::activations::{Activations, Shared, TileValues};
use super::finish::Finish;
use super::kernel::Panel;
use super::level::Level;
use super::norm::Norm;
use super::packing::{COLUMNS, LINE};
use super::product::Product;
use crate::parallel::{Guard, Parallel, Phase, Stretch};

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

/// Rows of float32 that one call of a run may write, and calls after it read.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    at: *mut f32,
    len: usize,
    is_mutable: bool,
    life: PhantomData<&'a mut [f32]>,
}

impl<'a> Rows<'a> {
    /// Rows to be read.
    pub(super) fn read(rows: &'a [f32]) -> Self {
        Self { at: rows.as_ptr().cast_mut(), len: rows.len(), is_mutable: false, life: PhantomData }
    }

    /// Rows to be written, and then read.
    pub(super) fn write(rows: &'a mut [f32]) -> Self {
        Self { at: rows.as_mut_ptr(), len: rows.len(), is_mutable: true, life: PhantomData }
    }

    /// Some of the values.
    ///
    /// # Safety
    /// Nobody writes any of them while they are read.
    unsafe fn part(self, start: usize, len: usize) -> &'a [f32] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: inside of the slice that this was made of; the caller vouches that it is only read.
        unsafe { std::slice::from_raw_parts(self.at.add(start), len) }
    }
}

/// A product of a run.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) product: Product,
    /// `[rows, k]`.
    pub(super) x: Rows<'a>,
    /// What is done to `x` first; its weight is `[k]`.
    pub(super) norm: Option<Norm<'a>>,
    /// `[num_panels, panel bytes]`.
    pub(super) weights: &'a [u8],
    /// `[num_panels, 32]`.
    pub(super) bias: Option<&'a [f32]>,
    /// Added to the output, of its shape.
    pub(super) addend: Option<Rows<'a>>,
    /// `[rows, width]`.
    pub(super) output: Rows<'a>,
}

impl Call<'_> {
    /// Panics unless all is of the shapes that `rows` rows need, and the output lies apart.
    fn check(&self, rows: usize) {
        let Self { product, x, norm, weights, addend, output, .. } = self;
        assert_eq!(x.len, rows * product.k);
        assert!(norm.is_none_or(|norm| norm.weight.len() == product.k));
        assert_eq!(weights.len(), product.num_panels() * product.panel_bytes());
        assert!(output.is_mutable && output.len == rows * product.width());
        assert!(addend.is_none_or(|addend| addend.len == output.len));
        // Those of one borrow are the same; those of two have nothing in common.
        assert!(output.at != x.at && addend.is_none_or(|addend| addend.at != output.at));
    }
}

/// Computes `calls` one after the other. Each may read what those before it wrote.
///
/// # Errors
/// When threads can't be had, or a task panicked: never for validated inputs.
pub(super) fn run<L: Level, const NUM: usize>(
    level: L,
    calls: &[Call; NUM],
    activations: &mut Activations,
    threads: &impl Parallel,
) -> Result<(), String> {
    let rows = calls[0].x.len / calls[0].product.k;
    calls.iter().for_each(|call| call.check(rows));
    let products: usize = calls.iter().map(|call| rows * call.product.k * call.product.n).sum();
    let num_threads = if products < MIN_PARALLEL_PRODUCTS { 1 } else { threads.num_threads() };
    let num_threads = num_threads.min(MAX_THREADS);
    let shapes = calls.each_ref().map(|call| (call.product.k, call.product.format.block_size));
    let mut shared = activations.share(level.tiles(rows), shapes).into_iter();
    let jobs = calls.each_ref().map(|call| Job::new(call, shared.next().expect("one a call"), num_threads));
    let guard = Guard::default();
    // Workers take what is to be done as they get to it.
    let work = |worker: usize| {
        guard.call(|| {
            jobs[0].prefetch(level, worker);
            for (i, job) in jobs.iter().enumerate() {
                job.multiply(level, worker, &guard);
                // What comes first of the next one's weights is on its way while this thread waits for others.
                if let Some(next) = jobs.get(i + 1) {
                    next.prefetch(level, worker);
                }
                job.wait();
            }
        });
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
    activations: Shared<'a>,
    /// Groups of tiles, which fit a core's cache.
    num_groups: usize,
    num_threads: usize,
    /// Pairs of a group and a panel, by threads.
    stretches: [Stretch; MAX_THREADS],
    quantised: Phase,
    multiplied: Phase,
}

// SAFETY: threads write disjoint parts of the output; see `multiply_group`.
unsafe impl Sync for Job<'_> {}

impl<'a> Job<'a> {
    fn new(call: &'a Call, activations: Shared<'a>, num_threads: usize) -> Self {
        let num_groups = call.x.len.div_ceil(GROUP_BYTES).clamp(1, activations.tiles().len().max(1));
        let (quantised, multiplied) = (Phase::default(), Phase::default());
        let stretches = std::array::from_fn(|_| Stretch::new(0, 0));
        let mut job = Self { call, activations, num_groups, num_threads, stretches, quantised, multiplied };
        for worker in 0..num_threads {
            job.stretches[worker] = Stretch::new(job.start(worker), job.start(worker + 1));
        }
        job
    }

    /// Pairs of a group and a panel.
    fn num_pairs(&self) -> usize {
        self.num_groups * self.call.product.num_panels()
    }

    /// The first of `worker`'s pairs.
    fn start(&self, worker: usize) -> usize {
        worker * self.num_pairs() / self.num_threads
    }

    /// Asks for the weights that `worker` reads first.
    fn prefetch<L: Level>(&self, level: L, worker: usize) {
        let panel = self.start(worker) % self.call.product.num_panels();
        let weights = &self.call.weights[panel * self.call.product.panel_bytes()..];
        level.prefetch_read(weights.as_ptr(), AHEAD);
    }

    /// Returns when all of the call is done, by whichever thread.
    fn wait(&self) {
        self.multiplied.wait(self.num_pairs());
    }

    /// Does `worker`'s part, and what others leave of theirs.
    fn multiply<L: Level>(&self, level: L, worker: usize, guard: &Guard) {
        self.quantised.run(self.activations.num_strips(), guard, |i| {
            // SAFETY: each strip is taken once, no tile before all of them are done, and the calls before this
            // one are done: nobody reads what they quantised, or writes what they gave.
            let (mut strip, x) = unsafe { (self.activations.strip(i), self.call.x.part(0, self.call.x.len)) };
            level.quantise(&mut strip, x, self.call.norm.as_ref());
        });
        self.multiply_groups(level, worker, guard);
    }

    /// Multiplies what is `worker`'s, then what others have left: each thread reads one stretch of weights from
    /// one end to the other, and all end together. All rows are quantised by then.
    fn multiply_groups<L: Level>(&self, level: L, worker: usize, guard: &Guard) {
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
        let mut num_done = 0;
        let mut multiply = |i| {
            guard.call(|| self.multiply_group(level, i, sums));
            num_done += 1;
        };
        while let Some(i) = self.stretches[worker].take_first() {
            multiply(i);
        }
        for stretch in &self.stretches[..self.num_threads] {
            while let Some(i) = stretch.take_last() {
                multiply(i);
            }
        }
        self.multiplied.add_done(num_done);
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
        let Rows { at: output, .. } = self.call.output;
        let first = p * product.panel_width();
        let columns = product.panel_width().min(width - first);
        for (i, tiles) in tiles.chunks(TILES).enumerate() {
            let first_row = tiles[0].first;
            let num_rows: usize = tiles.iter().map(|tile| tile.rows).sum();
            let mut content = [TileValues::default(); TILES];
            for (content, tile) in content.iter_mut().zip(tiles) {
                // SAFETY: all strips of this call's tiles are quantised and given back, and it is the only one
                // that is not done and has begun: see `run`.
                *content = unsafe { self.activations.tile(*tile) };
            }
            let sums = &mut sums[..num_rows];
            for row in first_row..first_row + num_rows {
                level.prefetch_write(output.wrapping_add(row * width + first), columns);
            }
            let panel = Panel { lines, format: product.format, ahead: if i == 0 { AHEAD } else { 0 } };
            level.multiply(&panel, &content[..tiles.len()], sums);
            let rows = (first_row..first_row + num_rows).map(|row| {
                let at = row * width + first;
                // SAFETY: `run` checked that the output holds all rows of this width, and shares nothing with
                // the addend; tiles have rows of their own and panels columns, and each pair is taken once.
                unsafe {
                    let addend = self.call.addend.map(|addend| addend.part(at, columns));
                    (std::slice::from_raw_parts_mut(output.add(at), columns), addend)
                }
            });
            level.finish(sums, &what, rows);
        }
    }
}
