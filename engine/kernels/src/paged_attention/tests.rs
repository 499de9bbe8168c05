//! Owns the proofs of the kernel: right to rounding, the same to the bit in any company.
//!
//! Invariant: every test runs at each level that the machine has, and failures name the seed.

mod world;

use half::bf16;

use super::element::Element;
use super::simd::Simd;
use super::simd::portable::Portable;
use crate::testing::{self, Random};
use counting_allocator::num_allocations;
use world::{Shape, Share, World};

/// The levels of this CPU; what AVX-VNNI adds is nothing to attention.
fn levels() -> impl Iterator<Item = (&'static str, Simd)> {
    testing::levels(Simd::named).filter(|(name, _)| *name != "avxvnni")
}

fn share(sequence: usize, past: usize, len: usize) -> Share {
    Share { sequence, past, len }
}

/// Whether each token's row is what plain attention in f64 gives.
fn compare<E: Element>(world: &World<E>, shares: &[Share], output: &[f32], what: &str) {
    compare_within(2e-5, world, shares, output, what);
}

fn compare_within<E: Element>(
    tolerance: f64,
    world: &World<E>,
    shares: &[Share],
    output: &[f32],
    what: &str,
) {
    let shape = world.shape;
    let width = shape.kv_heads * shape.group * shape.head_dim;
    let mut rows = output.chunks_exact(width);
    for share in shares {
        for position in share.past..share.past + share.len {
            let row = rows.next().unwrap();
            for (i, (got, want)) in row.iter().zip(world.expected(share.sequence, position)).enumerate() {
                let error = (f64::from(*got) - want).abs();
                assert!(
                    error < tolerance,
                    "{what}: {share:?} position {position} channel {i}: {got}, not {want}"
                );
            }
        }
    }
}

#[test]
fn mixed_batches_match_plain_attention() {
    for seed in 0..30 {
        let mut random = Random(seed);
        let shape = Shape::random(&mut random, 300);
        let block_size = random.pick(&[16, 32, 64, 128, 256]);
        let threads = random.pick(&[1, 2, 3, 4]);
        for (name, simd) in levels() {
            let what = format!("seed {seed} {name} {shape:?} block_size {block_size} threads {threads}");
            let mut world = World::<f32>::new(seed, seed + 7, shape, block_size, 4);
            // A prefill, and the pasts of a chunk and of a decode; an idle sequence in between.
            let (chunk, decode) = (1 + random.below(140), 1 + random.below(290));
            let first = [share(0, 0, 1 + random.below(40)), share(1, 0, chunk), share(3, 0, decode)];
            let output = world.step(&first, simd, threads);
            if seed % 3 == 0 {
                compare(&world, &first, &output, &what);
            }
            let second = [
                share(1, chunk, 1 + random.below(30)),
                share(2, 0, 0),
                share(0, first[0].len, 1),
                share(3, decode, 2),
            ];
            let output = world.step(&second, simd, threads);
            compare(&world, &second, &output, &what);
            only_these_slots(&world, &[&first[..], &second[..]].concat(), &what);
        }
    }
}

/// For a sanitizer above all: nothing is read or written outside of caches that have not a block to spare.
#[test]
fn caches_may_end_with_the_last_block_of_a_sequence() {
    first_and_last_block::<f32>(2e-5);
    // A key may be rounded the other way than its double.
    first_and_last_block::<bf16>(5e-2);
}

fn first_and_last_block<E: Element>(tolerance: f64) {
    for (seed, head_dim) in [1, 4, 8, 20, 50, 64, 100].into_iter().enumerate() {
        let half = head_dim / 4;
        let shape = Shape { kv_heads: 2, group: 3, head_dim, half, interleaved: false, max_len: 160 };
        for (block_size, len, backwards) in [(16, 144usize, false), (16, 131, true), (32, 160, true)] {
            for (name, simd) in levels() {
                let what = format!("{:?} {name} {shape:?} block_size {block_size} len {len}", E::TYPE);
                let mut world = World::<E>::new(seed as u64, 0, shape, block_size, 1);
                let num_blocks = len.div_ceil(block_size) as i32;
                world.tables[0] = (0..num_blocks).collect();
                if backwards {
                    world.tables[0].reverse();
                }
                let numbers = num_blocks as usize * block_size * shape.kv_heads * head_dim;
                let (mut key, mut value) =
                    (vec![E::round(f32::NAN); numbers], vec![E::round(f32::NAN); numbers]);
                for share in [share(0, 0, len - 2), share(0, len - 2, 2)] {
                    let call = world.call(&[share], backwards);
                    let output = world.run_over([&mut key, &mut value], &call, simd, 2).unwrap();
                    if share.len == 2 {
                        compare_within(tolerance, &world, &[share], &output, &what);
                    }
                }
            }
        }
    }
}

/// Whether exactly the slots of `shares` were written, and with what.
fn only_these_slots(world: &World, shares: &[Share], what: &str) {
    let Shape { kv_heads, group, head_dim, .. } = world.shape;
    let mut owner = vec![None; world.key.len() / (kv_heads * head_dim)];
    for share in shares {
        for position in share.past..share.past + share.len {
            owner[world.slot(share.sequence, position)] = Some((share.sequence, position));
        }
    }
    for (slot, owner) in owner.into_iter().enumerate() {
        for head in 0..kv_heads {
            let expected = owner.map(|(sequence, position)| {
                let key = world.head(sequence, position, kv_heads * group + head);
                (key, world.head(sequence, position, kv_heads * (group + 1) + head))
            });
            for channel in 0..head_dim {
                let [key, value] = world.places(slot, head, channel);
                let (key, value) = (world.key[key], world.value[value]);
                let Some((keys, values)) = &expected else {
                    assert!(key.is_nan() && value.is_nan(), "{what}: slot {slot} was written");
                    continue;
                };
                assert!((f64::from(key) - keys[channel]).abs() < 1e-5, "{what}: key in slot {slot}");
                assert_eq!(f64::from(value), values[channel], "{what}: value in slot {slot}");
            }
        }
    }
}

#[test]
fn a_call_allocates_nothing_once_the_workspace_has_grown() {
    let mut random = Random(3);
    let shape = Shape::random(&mut random, 300);
    for (name, simd) in levels() {
        let mut world = World::<f32>::new(3, 5, shape, 16, 2);
        world.step(&[share(0, 0, 200), share(1, 0, 90)], simd, 1);
        let call = world.call(&[share(0, 200, 40), share(1, 90, 1)], true);
        let mut count = || num_allocations(|| world.run(&call, simd, 1).unwrap());
        count();
        assert_eq!(count(), 1, "{name}: more than the output, which is the test's own");
    }
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|x| x.to_bits()).collect()
}

/// Queries and weights keep 16 bits or more, whatever multiplies them: bfloat16's 8 would miss by a thousandth.
#[test]
fn numbers_of_bfloat16_caches_are_used_as_they_are() {
    for seed in 50..60 {
        let mut random = Random(seed);
        let head_dim = random.pick(&[64, 80, 128, 256]);
        // Without rotation, so that keys are rounded as their doubles are.
        let shape = Shape { half: 0, ..Shape::of_heads(&mut random, head_dim, 300) };
        let block_size = random.pick(&[16, 32, 64]);
        for (name, simd) in levels() {
            let what = format!("seed {seed} {name} {shape:?} block_size {block_size}");
            let mut world = World::<bf16>::new(seed, seed + 7, shape, block_size, 2);
            let past = 1 + random.below(250);
            world.step(&[share(0, 0, past)], simd, 2);
            let shares = [share(0, past, 3), share(1, 0, 1 + random.below(40))];
            let output = world.step(&shares, simd, 2);
            compare_within(1e-4, &world, &shares, &output, &what);
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    for seed in 100..112 {
        let mut random = Random(seed);
        let len = 20 + random.below(500);
        same_bits::<f32>(seed, Shape::random(&mut random, len.max(300)), len);
    }
    for seed in 200..206 {
        let mut random = Random(seed);
        let (len, head_dim) = (20 + random.below(500), random.pick(&[64, 80, 128]));
        same_bits::<bf16>(seed, Shape::of_heads(&mut random, head_dim, len.max(300)), len);
    }
}

/// AMX apart, whose tiles multiply bfloat16.
#[test]
fn every_level_gives_the_same_bits() {
    for seed in 300..330 {
        let mut random = Random(seed);
        let head_dim = random.pick(&[64, 128, 20, 50, 80, 256]);
        let shape = Shape::of_heads(&mut random, head_dim, 340);
        equal_at_every_level::<f32>(seed, shape);
        equal_at_every_level::<bf16>(seed, shape);
    }
}

fn equal_at_every_level<E: Element>(seed: u64, shape: Shape) {
    let mut random = Random(seed + 1);
    let block_size = random.pick(&[16, 32, 64, 128, 256, 512]);
    // Every context up to the first length, then ragged ones.
    let (len, rows) = (1 + random.below(300), 1 + random.below(40));
    let baseline = Simd::Portable(Portable::baseline());
    let mut expected: Option<Vec<u32>> = None;
    for (name, simd) in
        [("baseline", baseline)].into_iter().chain(levels()).filter(|(name, _)| *name != "amx")
    {
        let mut world = World::<E>::new(seed, 1, shape, block_size, 1);
        let mut output = world.step(&[share(0, 0, len)], simd, 2);
        output.extend(world.step(&[share(0, len, rows)], simd, 3));
        let output = bits(&output);
        let want = expected.get_or_insert_with(|| output.clone());
        let at = output.iter().zip(&*want).position(|(got, want)| got != want);
        assert_eq!(at, None, "{:?} seed {seed} {name} {shape:?} block_size {block_size} len {len}", E::TYPE);
    }
}

fn same_bits<E: Element>(seed: u64, shape: Shape, len: usize) {
    let mut random = Random(seed + 1);
    let width = shape.kv_heads * shape.group * shape.head_dim;
    for (name, simd) in levels() {
        let mut alone = World::<E>::new(seed, 1, shape, 64, 1);
        let expected = bits(&alone.step(&[share(0, 0, len)], simd, 1));
        let check = |from: usize, output: &[f32], what: &str| {
            let got = bits(output);
            let want = &expected[from * width..from * width + got.len()];
            let at = got.iter().zip(want).position(|(got, want)| got != want);
            assert_eq!(at, None, "{:?} seed {seed} {name} {shape:?} len {len}: {what} from {from}", E::TYPE);
        };
        // Token by token, on many threads, so that long contexts are split.
        let mut decode = World::<E>::new(seed, 2, shape, 16, 1);
        let stride = random.pick(&[1, 2]);
        for position in (0..len).step_by(stride) {
            let count = stride.min(len - position);
            check(position, &decode.step(&[share(0, position, count)], simd, 8), "decode");
        }
        // In random chunks, among sequences that do the same at other places.
        let mut mixed = World::<E>::new(seed, seed, shape, random.pick(&[16, 32, 128, 256]), 3);
        let mut past = [0; 3];
        while past[0] < len {
            let mut order = [0, 1, 2];
            random.shuffle(&mut order);
            let longest = random.pick(&[1, 3, 17, 64, 200]);
            let shares = order.map(|sequence| {
                let end = if sequence == 0 { len } else { 300 };
                let left: usize = end - past[sequence];
                share(sequence, past[sequence], left.min(1 + random.below(longest)))
            });
            let output = mixed.step(&shares, simd, random.pick(&[1, 2, 3, 8]));
            let mut row = 0;
            for share in shares {
                let rows = &output[row * width..(row + share.len) * width];
                if share.sequence == 0 {
                    check(share.past, rows, "chunk");
                }
                row += share.len;
                past[share.sequence] += share.len;
            }
        }
    }
}

#[test]
fn a_slot_of_minus_one_writes_nothing_and_shared_blocks_are_read() {
    for (name, simd) in levels() {
        let shape = Shape { kv_heads: 2, group: 3, head_dim: 64, half: 16, interleaved: true, max_len: 64 };
        let mut world = World::<f32>::new(5, 6, shape, 16, 2);
        let prefix = world.step(&[share(0, 0, 40)], simd, 1);
        // Sequence 0 again, whose first 2 blocks are shared and not written once more.
        let own = world.tables[1][2];
        let written = world.tables[0].clone();
        world.tables[0][2] = own;
        let (key, value) = (world.key.clone(), world.value.clone());
        let mut call = world.call(&[share(0, 0, 40)], true);
        call.slots.as_mut().unwrap()[..32].fill(-1);
        assert_eq!(bits(&world.run(&call, simd, 2).unwrap()), bits(&prefix), "{name}");
        // The last 8 tokens, in sequence 0's third block before and in `own` now.
        let slots = |block: i32| (0..8).map(move |at| block as usize * 16 + at);
        let places = |world: &World, slot: usize, which: usize| -> Vec<usize> {
            let heads = 0..shape.kv_heads;
            heads
                .flat_map(|head| (0..shape.head_dim).map(move |channel| (head, channel)))
                .map(|(head, channel)| world.places(slot, head, channel)[which])
                .collect()
        };
        for (which, (before, after)) in [(&key, &world.key), (&value, &world.value)].into_iter().enumerate() {
            let mut changed: Vec<usize> =
                (0..before.len()).filter(|&i| before[i].to_bits() != after[i].to_bits()).collect();
            let mut expected: Vec<usize> = slots(own).flat_map(|slot| places(&world, slot, which)).collect();
            changed.sort_unstable();
            expected.sort_unstable();
            assert_eq!(changed, expected, "{name}");
            for (old, new) in slots(written[2]).zip(slots(own)) {
                let copies = places(&world, old, which).into_iter().zip(places(&world, new, which));
                for (old, new) in copies {
                    assert_eq!(after[new].to_bits(), before[old].to_bits(), "{name}");
                }
            }
        }
    }
}

#[test]
fn a_call_without_tokens_is_fine() {
    for (_, simd) in levels() {
        let shape = Shape { kv_heads: 1, group: 2, head_dim: 8, half: 2, interleaved: false, max_len: 64 };
        let mut world = World::<f32>::new(1, 1, shape, 16, 2);
        assert!(world.step(&[], simd, 2).is_empty());
        assert!(world.step(&[share(0, 0, 0), share(1, 60, 0)], simd, 2).is_empty());
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let shape = Shape { kv_heads: 2, group: 1, head_dim: 16, half: 4, interleaved: true, max_len: 64 };
    let refused = |name: &str, shares: &[Share], spoil: &dyn Fn(&mut World, &mut world::Call)| {
        let mut world = World::<f32>::new(1, 1, shape, 16, 2);
        let mut call = world.call(shares, true);
        spoil(&mut world, &mut call);
        let message = world.run(&call, Simd::named("portable").unwrap(), 1).unwrap_err();
        assert!(message.starts_with(&format!("{name}: ")), "{name}: {message}");
    };
    let two = [share(0, 0, 3), share(1, 5, 2)];
    refused("cumulative_sequence_length", &two, &|_, call| call.cumulative[0] = 1);
    refused("cumulative_sequence_length", &two, &|_, call| call.cumulative[1] = 6);
    refused("cumulative_sequence_length", &two, &|_, call| call.cumulative[2] = 4);
    refused("cumulative_sequence_length", &two, &|_, call| call.cumulative[1] = i32::MIN);
    refused("cumulative_sequence_length", &two, &|_, call| call.cumulative.clear());
    refused("past_seqlens", &two, &|_, call| call.past[1] = -1);
    refused("block_table", &two, &|_, call| call.past[1] = 63);
    refused("block_table", &two, &|_, call| call.past[1] = i32::MAX);
    refused("block_table", &two, &|_, call| call.table[0] = -1);
    refused("block_table", &two, &|_, call| call.table[4] = 11);
    refused("slot_mapping", &two, &|_, call| call.slots.as_mut().unwrap()[4] = -2);
    refused("slot_mapping", &two, &|_, call| call.slots.as_mut().unwrap()[4] = 11 * 16);
    refused("slot_mapping", &two, &|_, call| call.slots.as_mut().unwrap().truncate(4));
    refused("key_cache", &two, &|world, _| world.block_size = 8);
    refused("cos_cache", &[share(0, 15, 2)], &|world, _| {
        world.shape.max_len = 16;
        world.cos.truncate(16 * 4);
        world.sin.truncate(16 * 4);
    });
}
