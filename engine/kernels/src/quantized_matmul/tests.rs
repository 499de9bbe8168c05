//! Owns the proofs of the product: as defined, the same to the bit in any company, alone or in a run of several.
//!
//! Invariant: every test runs at each level that the machine has, and failures name the seed.

mod chain;
mod world;

use super::packing::Format;
use super::product::Product;
use super::simd::Simd;
use crate::testing::{self, Random};
use counting_allocator::num_allocations;
use world::{World, bits};

fn levels() -> impl Iterator<Item = (&'static str, Simd)> {
    testing::levels(Simd::named)
}

const FORMATS: [Format; 10] = {
    const fn format(bits: usize, block_size: usize) -> Format {
        Format { bits, block_size }
    }
    [
        format(4, 32),
        format(4, 64),
        format(4, 128),
        format(4, 256),
        format(4, 512),
        format(8, 32),
        format(8, 64),
        format(8, 128),
        format(8, 256),
        format(8, 512),
    ]
};

fn random_product(random: &mut Random, format: Format) -> Product {
    let swiglu = random.below(3) == 0;
    let n = 1 + random.below(150);
    Product {
        k: format.block_size * (1 + random.below(6)),
        n: if swiglu { 2 * n } else { n },
        format,
        swiglu,
    }
}

#[test]
fn every_level_computes_what_is_defined_to_the_bit() {
    for seed in 0..60 {
        let random = &mut Random(seed);
        let product = random_product(random, FORMATS[seed as usize % FORMATS.len()]);
        let rows = 1 + random.below(40);
        let mut world = World::new(random, product, rows);
        let mut first: Option<Vec<u32>> = None;
        for (name, simd) in levels() {
            let threads = random.pick(&[1, 2, 3]);
            let what = format!("seed {seed} {name} {product:?} rows {rows} threads {threads}");
            world.forget();
            let output = world.run(simd, 0..rows, threads);
            for (r, row) in output.chunks_exact(product.width()).enumerate() {
                for (c, (got, want)) in row.iter().zip(world.plain(r)).enumerate() {
                    let same = match product.swiglu {
                        false => got.to_bits() == want.to_bits(),
                        true => (got - want).abs() <= 1e-6 * want.abs() + 1e-30,
                    };
                    assert!(same, "{what}: row {r} column {c} is {got}, not {want}");
                }
            }
            let output = bits(&output);
            assert!(*first.get_or_insert_with(|| output.clone()) == output, "{what}: level changes bits");
        }
    }
}

#[test]
fn a_row_is_the_same_in_any_batch() {
    for (seed, format) in FORMATS.into_iter().enumerate() {
        let random = &mut Random(seed as u64);
        // Wide enough for groups of tiles, parts of two groups, threads and a last panel that is not full.
        let k = 1152_usize.next_multiple_of(format.block_size);
        let product = Product { k, n: 2 * 120, format, swiglu: seed % 2 == 0 };
        let mut world = World::new(random, product, 512);
        let width = product.width();
        for (name, simd) in levels() {
            let batch = bits(&world.run(simd, 0..512, 2));
            for rows in [1, 2, 3, 5, 8, 11, 15, 16, 17, 20, 21, 31, 32, 33, 64, 100, 511] {
                let start = random.below(513 - rows);
                let part = bits(&world.run(simd, start..start + rows, 1 + rows % 3));
                let same = part == batch[start * width..(start + rows) * width];
                assert!(same, "{name} seed {seed}: {rows} rows from {start}");
            }
        }
    }
}

#[test]
fn errors_against_float64_are_those_of_eight_bits() {
    for (seed, format) in FORMATS.into_iter().enumerate() {
        let product = Product { k: 1024, n: 64, format, swiglu: false };
        let world = World::new(&mut Random(seed as u64), product, 8);
        let simd = Simd::choose(None).unwrap();
        let mut world = World::with(product, world.codes, world.scales, None, world.x);
        let output = world.run(simd, 0..8, 1);
        let (mut error, mut norm) = (0.0, 0.0);
        for (r, row) in output.chunks_exact(64).enumerate() {
            for (got, want) in row.iter().zip(world.exact(r)) {
                error += (f64::from(*got) - want).powi(2);
                norm += want * want;
            }
        }
        let error = (error / norm).sqrt();
        // Outliers of 40 deviations spoil their own block only, so small blocks are better.
        let bound = match format.block_size {
            32 => 0.013,
            64 => 0.02,
            128 => 0.028,
            _ => 0.04,
        };
        println!("{format:?}: {error:.5}");
        assert!((bound / 4.0..bound).contains(&error), "{format:?} seed {seed}: {error}");
    }
}

#[test]
fn extreme_codes_and_values_do_not_saturate() {
    for format in FORMATS {
        let (low, high) = if format.bits == 4 { (0, 15) } else { (0, 255) };
        let product = Product { k: 2 * format.block_size, n: 4, format, swiglu: false };
        let k = product.k;
        // Codes of each extreme, and both in turn, against values of each sign and both in turn.
        let codes = (0..4 * k).map(|i| match i / k {
            0 => low,
            1 => high,
            2 => [low, high][i % 2],
            _ => [high, high, low, low][i % 4],
        });
        let x = (0..4 * k).map(|i| match i / k {
            0 => 1.0,
            1 => -1.0,
            2 => [1.0, -1.0][i % 2],
            _ => [-1.0, -1.0, 1.0, 1.0][i % 4],
        });
        let (codes, x) = (codes.collect(), x.collect());
        let mut world = World::with(product, codes, vec![0x3c00; 8], None, x);
        for (name, simd) in levels() {
            let output = world.run(simd, 0..4, 1);
            let want: Vec<f32> = (0..4).flat_map(|row| world.plain(row)).collect();
            assert_eq!(bits(&output), bits(&want), "{name} {format:?}: {output:?}, not {want:?}");
        }
    }
}

#[test]
fn levels_agree_where_products_come_near_the_ends_of_float32() {
    let random = &mut Random(7);
    for format in FORMATS {
        // A block a row.
        let product = Product { k: format.block_size, n: 33, format, swiglu: false };
        let World { mut codes, scales, x, .. } = World::new(random, product, 40);
        // A column of nothing, which infinity would make no number.
        codes[..product.k].fill(1 << (format.bits - 1));
        // The largest float16 and the smallest.
        let scales = (0..scales.len()).map(|i| [0x7bff, 1][i % 2]).collect();
        let sizes = [1e-29, 1e-20, 1e-19, 1e33, 3e34, 1e36, 1e38];
        let x = x.iter().enumerate().map(|(i, x)| x * sizes[i / product.k % sizes.len()]).collect();
        let mut world = World::with(product, codes, scales, None, x);
        let mut first: Option<Vec<u32>> = None;
        for (name, simd) in levels() {
            // A number that is none may be written in several ways.
            let output = world
                .run(simd, 0..40, 1)
                .iter()
                .map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() })
                .collect();
            assert_eq!(*first.get_or_insert_with(|| Vec::clone(&output)), output, "{name} {format:?}");
        }
    }
}

#[test]
fn what_is_not_a_number_stays_in_its_row() {
    const K: usize = 512;
    let random = &mut Random(5);
    for format in FORMATS {
        for swiglu in [false, true] {
            let product = Product { k: K, n: 70, format, swiglu };
            let mut world = World::new(random, product, 20);
            let clean = world.x.clone();
            for (name, simd) in levels() {
                world.x.clone_from(&clean);
                let before = bits(&world.run(simd, 0..20, 1));
                world.x[3 * K + 77] = f32::NAN;
                world.x[18 * K + 400] = f32::INFINITY;
                let after = world.run(simd, 0..20, 1);
                for (r, row) in after.chunks_exact(product.width()).enumerate() {
                    match r {
                        3 | 18 => assert!(row.iter().all(|x| x.is_nan()), "{name} {format:?}: row {r}"),
                        _ => assert_eq!(
                            bits(row),
                            before[r * product.width()..(r + 1) * product.width()],
                            "{name}: row {r}"
                        ),
                    }
                }
            }
        }
    }
}

#[test]
fn a_call_allocates_nothing_once_the_workspace_has_grown() {
    let format = Format { bits: 4, block_size: 32 };
    let product = Product { k: 96, n: 70, format, swiglu: false };
    let mut world = World::new(&mut Random(1), product, 40);
    for (name, simd) in levels() {
        world.run(simd, 0..40, 1);
        for rows in [40, 1, 17] {
            let count = num_allocations(|| world.run(simd, 0..rows, 1));
            assert_eq!(count, 1, "{name}: more than the output, which is the test's own");
        }
    }
}

#[test]
fn the_golden_packing_of_the_exporter_is_this_one() {
    use sha2::{Digest, Sha256};
    let golden = include_str!("../../../../export/tests/golden/packing.json");
    let golden: Vec<serde_json::Value> = serde_json::from_str(golden).unwrap();
    assert_eq!(golden.len(), 6);
    for case in golden {
        let int = |name: &str| case[name].as_i64();
        let product = Product::check(int, |name| case[name].as_str().map(Into::into)).unwrap();
        let Product { k, n, format, .. } = product;
        // By the formula of export/tests/test_packing.py.
        let code = |i: usize| (5 * (i / k) + 3 * (i % k) + i / k * (i % k)) % (1 << format.bits);
        let blocks = k / format.block_size;
        let scale = |i: usize| 0x2000 + 16 * (i / blocks) + i % blocks;
        let codes = (0..n * k).map(|i| code(i) as u8).collect();
        let scales = (0..n * blocks).map(|i| scale(i) as u16).collect();
        let world = World::with(product, codes, scales, None, vec![]);
        let hash: String = Sha256::digest(world.weights()).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(case["sha256"].as_str().unwrap(), hash, "{product:?}");
    }
}
