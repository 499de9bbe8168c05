//! A short run of every fuzz target without coverage: the examples, then inputs made of them. None of them may
//! take more memory than a small multiple of its input.
//!
//! `GLMSERVE_FUZZ_SEED` repeats a run and `GLMSERVE_FUZZ_RUNS` makes it longer. A failure prints the seed,
//! and the input as a Rust literal to add to the examples.

#[path = "../../server/src/peak_memory.rs"]
mod peak_memory;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use glm_simulator::rng::Rng;
use glmserve_tests::fuzz::{Target, mutator, target};

use self::peak_memory::peak_bytes;

const NUM_RUNS: u64 = 5_000;
/// What a target may hold at once for each byte of its input, and besides: messages of errors, tables.
const BYTES_FOR_EACH: usize = 64;
const BYTES_BESIDES: usize = 64 * 1024;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().expect("a whole number"))
}

fn examples(target: Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.name);
    let mut paths: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} has no examples", folder.display());
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

fn fuzz(name: &str) {
    let target = target(name);
    let examples = examples(target);
    let seed = number("GLMSERVE_FUZZ_SEED", 1);
    // What is made once and kept belongs to no input.
    (target.run)(&examples[0]);
    let mut rng = Rng::new(seed);
    let made = (0..number("GLMSERVE_FUZZ_RUNS", NUM_RUNS)).map(|_| mutator::input(&mut rng, &examples));
    for input in examples.iter().cloned().chain(made) {
        let result = catch_unwind(AssertUnwindSafe(|| peak_bytes(|| (target.run)(&input))));
        let shown = || format!("seed {seed}, input b\"{}\"", input.escape_ascii());
        let Ok(peak) = result else { panic!("{name} fails: {}", shown()) };
        let bound = BYTES_BESIDES + BYTES_FOR_EACH * input.len();
        assert!(peak <= bound, "{name} takes {peak} bytes of memory, more than {bound}: {}", shown());
    }
}

#[test]
fn bodies_are_requests_or_a_clients_mistake() {
    fuzz("bodies");
}

#[test]
fn headers_are_read_as_they_are_written() {
    fuzz("headers");
}

#[test]
fn key_files_give_keys_or_an_error_without_secrets() {
    fuzz("key_file");
}

#[test]
fn manifests_are_read_or_refused() {
    fuzz("manifest");
}

#[test]
fn replies_end_at_the_first_stop_string() {
    fuzz("reply_text");
}

#[test]
fn event_streams_are_read_alike_however_they_are_cut() {
    fuzz("sse");
}
