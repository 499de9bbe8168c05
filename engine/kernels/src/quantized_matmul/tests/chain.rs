//! Owns the proofs of runs of several products, as PostAttention has them: what each gives alone, to the bit.
//!
//! Invariant: what is expected is computed a product at a time, with a norm of its own.

use std::ops::Range;

use super::world::{World, bits};
use super::{FORMATS, levels};
use crate::quantized_matmul::activations::Activations;
use crate::quantized_matmul::multiply::{Call, Rows};
use crate::quantized_matmul::norm::Norm;
use crate::quantized_matmul::packing::Format;
use crate::quantized_matmul::product::Product;
use crate::quantized_matmul::simd::Simd;
use crate::testing::{Random, Threads};
use counting_allocator::num_allocations;

const EPSILON: f32 = 1e-5;

/// What lies between two attentions.
struct Chain {
    /// Dense, gate and up, down, next: with rows of their own that do not matter but for the first's.
    products: [World; 4],
    norms: [Vec<f32>; 2],
    /// `[rows, hidden]`
    residual: Vec<f32>,
    activations: Activations,
}

/// Some rows of the outputs.
#[derive(Debug, PartialEq)]
struct Outputs {
    next: Vec<u32>,
    residual: Vec<u32>,
}

impl Chain {
    /// Sizes are a few blocks each, and not the same.
    fn new(random: &mut Random, formats: [Format; 4], rows: usize) -> Self {
        let (block, ffn_block) = (formats[1].block_size.max(formats[3].block_size), formats[2].block_size);
        let k = formats[0].block_size * (1 + random.below(2));
        let (hidden, ffn) = (block * (1 + random.below(2)), ffn_block * (1 + random.below(3)));
        let sizes = [(k, hidden), (hidden, 2 * ffn), (ffn, hidden), (hidden, 1 + random.below(90))];
        let products = std::array::from_fn(|i| {
            let ((k, n), format) = (sizes[i], formats[i]);
            let World { product, codes, scales, bias, x, .. } =
                World::new(random, Product { k, n, format, swiglu: i == 1 }, rows);
            World::with(product, codes, scales, bias.filter(|_| i == 3), x)
        });
        let mut noise = |len: usize| (0..len).map(|_| random.noise()).collect();
        let (norms, residual) = ([noise(hidden), noise(hidden)], noise(rows * hidden));
        Self { products, norms, residual, activations: Activations::default() }
    }

    fn hidden(&self) -> usize {
        self.products[0].product.n
    }

    /// All at once, for some of the rows.
    fn run(&mut self, simd: Simd, rows: Range<usize>, threads: usize) -> Outputs {
        let (count, hidden) = (rows.len(), self.hidden());
        let [dense, gate_up, down, next] = &self.products;
        let (mut middle, mut gated) =
            (vec![f32::NAN; count * hidden], vec![f32::NAN; count * down.product.k]);
        let (mut residual, mut output) = (middle.clone(), vec![f32::NAN; count * next.product.n]);
        {
            let k = dense.product.k;
            let (x, before) =
                (&dense.x[rows.start * k..rows.end * k], rows.start * hidden..rows.end * hidden);
            let before = &self.residual[before];
            let [middle, gated, residual, output] =
                [&mut middle[..], &mut gated, &mut residual, &mut output].map(Rows::write);
            let norm = |i: usize| Some(Norm { weight: &self.norms[i], epsilon: EPSILON });
            let calls = [
                Call { addend: Some(Rows::read(before)), ..call(dense, Rows::read(x), None, middle) },
                call(gate_up, middle, norm(0), gated),
                Call { addend: Some(middle), ..call(down, gated, None, residual) },
                call(next, residual, norm(1), output),
            ];
            simd.run(&calls, &mut self.activations, &Threads(threads)).unwrap();
        }
        Outputs { next: bits(&output), residual: bits(&residual) }
    }

    /// One after the other, for all rows, by products that are proven alone.
    fn plain(&mut self) -> Outputs {
        let simd = Simd::named("portable").unwrap();
        let rows = self.residual.len() / self.hidden();
        let mut each = |i: usize, x: Option<Vec<f32>>| {
            if let Some(x) = x {
                self.products[i].x = x;
            }
            self.products[i].run(simd, 0..rows, 1)
        };
        let add = |a: &[f32], b: &[f32]| -> Vec<f32> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
        let middle = add(&each(0, None), &self.residual);
        let gated = each(1, Some(normed(&middle, &self.norms[0])));
        let residual = add(&each(2, Some(gated)), &middle);
        let next = each(3, Some(normed(&residual, &self.norms[1])));
        Outputs { next: bits(&next), residual: bits(&residual) }
    }
}

fn call<'a>(world: &'a World, x: Rows<'a>, norm: Option<Norm<'a>>, output: Rows<'a>) -> Call<'a> {
    let (weights, bias) = (world.weights(), world.packed_bias());
    Call { product: world.product, x, norm, weights, bias, addend: None, output }
}

/// RMSNorm of rows as long as `weight`: square i is added to sum i mod 32, and halves of the sums to each other.
fn normed(rows: &[f32], weight: &[f32]) -> Vec<f32> {
    let row = |row: &[f32]| {
        let mut sums = vec![0f32; 32];
        row.iter().enumerate().for_each(|(i, x)| sums[i % 32] += x * x);
        while sums.len() > 1 {
            let upper = sums.split_off(sums.len() / 2);
            sums.iter_mut().zip(upper).for_each(|(sum, other)| *sum += other);
        }
        let factor = 1.0 / (sums[0] / row.len() as f32 + EPSILON).sqrt();
        row.iter().zip(weight).map(|(x, weight)| x * factor * weight).collect::<Vec<f32>>()
    };
    rows.chunks_exact(weight.len()).flat_map(row).collect()
}

#[test]
fn a_run_gives_what_its_products_give_one_by_one_at_every_level() {
    for seed in 0..40 {
        let random = &mut Random(seed);
        let bits = random.pick(&[4, 8]);
        let formats = std::array::from_fn(|_| {
            loop {
                let format = random.pick(&FORMATS);
                if format.bits == bits {
                    break format;
                }
            }
        });
        let rows = 1 + random.below(40);
        let mut chain = Chain::new(random, formats, rows);
        let want = chain.plain();
        for (name, simd) in levels() {
            let threads = random.pick(&[1, 2, 3]);
            let same = chain.run(simd, 0..rows, threads) == want;
            assert!(same, "seed {seed} {name} {formats:?} rows {rows} threads {threads}");
        }
    }
}

#[test]
fn a_row_of_a_run_is_the_same_in_any_batch() {
    let format = Format { bits: 4, block_size: 128 };
    let random = &mut Random(3);
    let mut chain = Chain::new(random, [format; 4], 300);
    let (hidden, width) = (chain.hidden(), chain.products[3].product.n);
    for (name, simd) in levels() {
        let batch = chain.run(simd, 0..300, 2);
        for rows in [1, 2, 4, 5, 15, 16, 17, 33, 128, 299] {
            let start = random.below(301 - rows);
            let part = chain.run(simd, start..start + rows, 1 + rows % 3);
            assert!(part.next == batch.next[start * width..][..rows * width], "{name}: {rows} from {start}");
            let same = part.residual == batch.residual[start * hidden..][..rows * hidden];
            assert!(same, "{name}: residual of {rows} from {start}");
        }
    }
}

#[test]
fn what_is_not_a_number_stays_in_its_row_of_a_run() {
    let format = Format { bits: 8, block_size: 32 };
    let mut chain = Chain::new(&mut Random(9), [format; 4], 20);
    let (hidden, width) = (chain.hidden(), chain.products[3].product.n);
    let clean = chain.residual.clone();
    for (name, simd) in levels() {
        chain.residual.clone_from(&clean);
        let before = chain.run(simd, 0..20, 2);
        // The second's square is infinite.
        (chain.residual[3 * hidden + 7], chain.residual[18 * hidden + 1]) = (f32::NAN, 1e30);
        let after = chain.run(simd, 0..20, 2);
        for (r, row) in after.next.chunks_exact(width).enumerate() {
            match r {
                3 | 18 => assert!(row.iter().all(|&x| f32::from_bits(x).is_nan()), "{name}: row {r}"),
                _ => assert_eq!(row, &before.next[r * width..(r + 1) * width], "{name}: row {r}"),
            }
        }
    }
}

#[test]
fn a_run_allocates_nothing_once_the_workspace_has_grown() {
    let format = Format { bits: 4, block_size: 32 };
    let mut chain = Chain::new(&mut Random(1), [format; 4], 40);
    for (name, simd) in levels() {
        chain.run(simd, 0..40, 1);
        // Its four vectors of rows, and two of bits, are the test's own.
        for rows in [40, 1, 17] {
            assert_eq!(num_allocations(|| chain.run(simd, 0..rows, 1)), 6, "{name}");
        }
    }
}
