//! Owns the kernel's arithmetic in plain Rust, for any CPU.
//!
//! Invariant: it needs no instruction beyond the target's baseline and no unsafe code.

use crate::quantized_matmul::activations::{RowBlock, Strip, TileValues};
use crate::quantized_matmul::finish::{Finish, OutputRow, finish};
use crate::quantized_matmul::kernel::{Lanes, Panel, multiply, multiply_rows};
use crate::quantized_matmul::level::{Level, for_each_tile};
use crate::quantized_matmul::norm::Norm;
use crate::quantized_matmul::packing::{COLUMNS, HALF, Line, STEP, half_to_float};

/// Plain Rust.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Portable;

impl Lanes for Portable {
    const NUM: usize = HALF;
    type Codes = Line;
    type Sums = [i32; HALF];

    #[inline(always)]
    fn start<const BITS: usize>(self, row: &RowBlock) -> [[i32; HALF]; 2] {
        let first = if BITS == 4 { row.offset_4 } else { row.offset_8 };
        [[first; HALF], [row.offset_8; HALF]]
    }
    #[inline(always)]
    fn codes<const BITS: usize>(self, step: &[Line], _v: usize) -> [Line; 2] {
        match BITS {
            4 => [step[0].map(|byte| byte & 0x0f), step[0].map(|byte| byte & 0xf0)],
            _ => [step[0], step[1]],
        }
    }
    #[inline(always)]
    fn dot<const BITS: usize>(self, mut sums: [i32; HALF], codes: Line, x: i32) -> [i32; HALF] {
        let x = x.to_ne_bytes();
        for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<STEP>().0) {
            for j in 0..STEP {
                *sum += i32::from(codes[j]) * i32::from(x[j].cast_signed());
            }
        }
        sums
    }
    #[inline(always)]
    fn fold<const BITS: usize>(
        self,
        _second: bool,
        sums: [i32; HALF],
        scales: &[u8],
        row: f32,
        to: &mut [f32],
    ) {
        for ((to, sum), scale) in to.iter_mut().zip(sums).zip(scales.as_chunks().0) {
            *to = (sum as f32).mul_add(half_to_float(u16::from_le_bytes(*scale)) * row, *to);
        }
    }
    #[inline(always)]
    fn prefetch(self, _line: &Line, _ahead: usize) {}
}

impl Level for Portable {
    const MAX_ROWS: usize = 4;

    fn quantise(self, strip: &mut Strip, x: &[f32], norm: Option<&Norm>) {
        strip.quantise(x, norm);
    }
    fn multiply(self, panel: &Panel, tiles: &[TileValues], sums: &mut [[f32; COLUMNS]]) {
        fn kernel<const BITS: usize, const ROWS: usize>(
            panel: &Panel,
            tile: &TileValues,
            sums: &mut [[f32; COLUMNS]],
        ) {
            multiply::<_, BITS, ROWS>(Portable, panel, tile, sums);
        }
        for_each_tile(panel, tiles, sums, |panel, tile, sums| {
            multiply_rows!(kernel, tile.height, panel.format.bits, (panel, tile, sums), [1 2 3 4]);
        });
    }
    fn finish<'a>(
        self,
        sums: &mut [[f32; COLUMNS]],
        what: &Finish,
        outputs: impl Iterator<Item = OutputRow<'a>>,
    ) {
        finish(sums, what, outputs);
    }
}
