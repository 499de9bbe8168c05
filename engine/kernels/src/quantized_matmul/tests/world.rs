//! Owns random products for the tests, packed by a plain reading of the drawing, and what they are.
//!
//! Invariant: nothing here shares code with the kernels but sizes. What they read and write ends where its
//! allocation ends, so that a sanitizer sees a step beyond.

use crate::quantized_matmul::activations::Activations;
use crate::quantized_matmul::multiply::{Call, Rows};
use crate::quantized_matmul::packing::{COLUMNS, half_to_float};
use crate::quantized_matmul::product::Product;
use crate::quantized_matmul::simd::Simd;
use crate::testing::{Random, Threads};

/// A matrix of codes and scales, and rows to multiply it with.
pub(super) struct World {
    pub(super) product: Product,
    /// `[n, k]`.
    pub(super) codes: Vec<u8>,
    /// `[n, k / block_size]`, patterns of float16.
    pub(super) scales: Vec<u16>,
    /// `[n]`.
    pub(super) bias: Option<Vec<f32>>,
    /// `[rows, k]`.
    pub(super) x: Vec<f32>,
    weights: Box<[u8]>,
    packed_bias: Option<Box<[f32]>>,
    activations: Activations,
}

impl World {
    pub(super) fn new(random: &mut Random, product: Product, rows: usize) -> Self {
        let Product { k, n, format, .. } = product;
        let codes = (0..n * k).map(|_| match format.bits {
            4 => random.below(16) as u8,
            _ => random.below(256) as u8,
        });
        let codes = codes.collect();
        // From 2^-9 to 2^-6, with either sign; one in eight is 0.
        let scales = (0..n * k / format.block_size).map(|_| match random.below(8) {
            0 => 0,
            _ => ((6 + random.below(3)) << 10 | random.below(1024) | random.below(2) << 15) as u16,
        });
        let scales = scales.collect();
        let bias = (random.below(2) == 0).then(|| (0..n).map(|_| random.noise()).collect());
        // Now and then an outlier, and a block of nothing.
        let x = (0..rows * k).map(|i| match random.below(200) {
            0 => 40.0 * random.noise(),
            _ if i / format.block_size % 7 == 5 => 0.0,
            _ => random.noise(),
        });
        let x = x.collect();
        Self::with(product, codes, scales, bias, x)
    }

    pub(super) fn with(
        product: Product,
        codes: Vec<u8>,
        scales: Vec<u16>,
        bias: Option<Vec<f32>>,
        x: Vec<f32>,
    ) -> Self {
        let mut world = Self {
            product,
            codes,
            scales,
            bias,
            x,
            weights: Box::default(),
            packed_bias: None,
            activations: Activations::default(),
        };
        world.pack();
        world
    }

    /// The matrix's row that column `c` of panel `p` is.
    fn row_of(&self, p: usize, c: usize) -> Option<usize> {
        let Product { n, swiglu, .. } = self.product;
        let (row, end) = match swiglu {
            false => (32 * p + c, n),
            true if c < 16 => (16 * p + c, n / 2),
            true => (n / 2 + 16 * p + c - 16, n),
        };
        (row < end).then_some(row)
    }

    fn pack(&mut self) {
        let Product { k, format, .. } = self.product;
        let blocks = k / format.block_size;
        let (mut weights, mut bias) = (vec![], vec![]);
        for p in 0..self.product.num_panels() {
            let rows: Vec<_> = (0..COLUMNS).map(|c| self.row_of(p, c)).collect();
            let zero = 1u8 << (format.bits - 1);
            let code = |c: usize, k4: usize| rows[c].map_or(zero, |row| self.codes[row * k + k4]);
            for b in 0..blocks {
                for s in 0..format.block_size / 4 {
                    let at = |byte: usize| b * format.block_size + 4 * s + byte % 4;
                    if format.bits == 4 {
                        weights.extend((0..64).map(|i| code(i / 4, at(i)) | code(16 + i / 4, at(i)) << 4));
                    } else {
                        weights.extend((0..128).map(|i| code(i / 4, at(i))));
                    }
                }
                let scales = rows.iter().map(|row| row.map_or(0, |row| self.scales[row * blocks + b]));
                weights.extend(scales.flat_map(u16::to_le_bytes));
            }
            if let Some(values) = &self.bias {
                bias.extend(rows.iter().map(|row| row.map_or(0.0, |row| values[row])));
            }
        }
        self.weights = weights.into_boxed_slice();
        self.packed_bias = self.bias.is_some().then_some(bias.into_boxed_slice());
    }

    /// Gives the memory of quantised rows back, so that the next call has as much as it needs and no more.
    pub(super) fn forget(&mut self) {
        self.activations = Activations::default();
    }

    pub(super) fn weights(&self) -> &[u8] {
        &self.weights
    }

    pub(super) fn packed_bias(&self) -> Option<&[f32]> {
        self.packed_bias.as_deref()
    }

    /// The output for some of the rows.
    pub(super) fn run(&mut self, simd: Simd, rows: std::ops::Range<usize>, threads: usize) -> Vec<f32> {
        let Product { k, .. } = self.product;
        let mut output = vec![f32::NAN; rows.len() * self.product.width()];
        let x = &self.x[rows.start * k..rows.end * k];
        let call = Call {
            product: self.product,
            x: Rows::read(x),
            norm: None,
            weights: &self.weights,
            bias: self.packed_bias.as_deref(),
            addend: None,
            output: Rows::write(&mut output),
        };
        simd.run(&[call], &mut self.activations, &Threads(threads)).unwrap();
        output
    }

    /// One row's sums, `[n]`, by the operator's definition, one operation after the other.
    fn plain_sums(&self, row: usize) -> Vec<f32> {
        let Product { k, n, format, .. } = self.product;
        let x = &self.x[row * k..(row + 1) * k];
        let blocks = k / format.block_size;
        let quantised: Vec<(f32, Vec<i32>)> = x
            .chunks(format.block_size)
            .map(|block| {
                let top = block.iter().fold(0f32, |top, x| top.max(x.abs()));
                let factor = if top == 0.0 { 0.0 } else { 127.0 / top };
                (top / 127.0, block.iter().map(|x| (x * factor).round_ties_even() as i32).collect())
            })
            .collect();
        let zero = 1 << (format.bits - 1);
        (0..n)
            .map(|column| {
                let mut sum = 0f32;
                for (b, (scale, values)) in quantised.iter().enumerate() {
                    let codes = &self.codes[column * k + b * format.block_size..];
                    let products = values.iter().zip(codes).map(|(v, &code)| v * (i32::from(code) - zero));
                    let whole: i32 = products.sum();
                    let factor = half_to_float(self.scales[column * blocks + b]) * scale;
                    sum = (whole as f32).mul_add(factor, sum);
                }
                sum + self.bias.as_ref().map_or(0.0, |bias| bias[column])
            })
            .collect()
    }

    /// One row's output. With swiglu it is not exact to the last bit.
    pub(super) fn plain(&self, row: usize) -> Vec<f32> {
        let sums = self.plain_sums(row);
        if !self.product.swiglu {
            return sums;
        }
        let (gates, ups) = sums.split_at(self.product.n / 2);
        let silu = |x: f64| x / (1.0 + (-x).exp());
        gates.iter().zip(ups).map(|(&g, &u)| (silu(f64::from(g)) * f64::from(u)) as f32).collect()
    }

    /// One row times the matrix in float64, without bias or epilogue.
    pub(super) fn exact(&self, row: usize) -> Vec<f64> {
        let Product { k, n, format, .. } = self.product;
        let zero = f64::from(1 << (format.bits - 1));
        let weight = |column: usize, i: usize| {
            let scale = self.scales[(column * k + i) / format.block_size];
            (f64::from(self.codes[column * k + i]) - zero) * f64::from(half_to_float(scale))
        };
        let x = &self.x[row * k..(row + 1) * k];
        (0..n).map(|c| (0..k).map(|i| f64::from(x[i]) * weight(c, i)).sum()).collect()
    }
}

pub(super) fn bits(rows: &[f32]) -> Vec<u32> {
    rows.iter().map(|x| x.to_bits()).collect()
}
