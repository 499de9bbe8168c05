//! Owns the proof that the runner opens, feeds and reads a session of ONNX Runtime's CUDA provider.
//!
//! Runs where `GLMSERVE_TEST_CUDA` names the folder of `export/tests/cuda_folders.py` and
//! `GLMSERVE_ORT_LIB` the GPU wheel's library, over the test double of the CUDA libraries: `make
//! test-cuda`. Numbers mean nothing there: all logits are zero, so every greedy token is 0.

use std::path::{Path, PathBuf};
use std::time::Duration;

use glm_engine::runner::ModelRunner;
use glm_engine::runner::ort::{KvCacheMemory, OrtOptions, OrtRunner};
use glm_engine::{Engine, EngineConfig, FinishReason, LoadError, Manifest, Request, RequestId, StepPlan};
use glm_engine::{SamplingParams, TokenEvent};

const BLOCK_SIZE: usize = 128;
const GRAPHS: [&str; 13] = [
    "fp16",
    "bf16",
    "fp8-fp16",
    "fp8-bf16",
    "int8-fp16",
    "int4-fp16",
    "int8-bf16",
    "int4-bf16",
    "fp16-logits",
    "fp16-kv-fp8",
    "bf16-kv-fp8",
    "fp16-kv-int8",
    "int4-kv-int4",
];

fn options() -> OrtOptions {
    let library = std::env::var_os("GLMSERVE_ORT_LIB").expect("GLMSERVE_ORT_LIB is not set");
    OrtOptions {
        max_num_seqs: 512,
        device_memory_bytes: Some(1 << 30),
        enforce_eager: true,
        ..OrtOptions::new(library.into(), 1, 8 << 20)
    }
}

fn with_graphs() -> OrtOptions {
    OrtOptions { enforce_eager: false, ..options() }
}

fn load(folder: &Path, options: &OrtOptions) -> Result<(OrtRunner, usize), LoadError> {
    let manifest = Manifest::load(folder)?;
    Ok((OrtRunner::load(folder, &manifest, options)?, manifest.geometry.vocab_size))
}

fn set(name: &str, value: &str) {
    // SAFETY: one test, and nothing but the double, which this thread calls, reads the environment.
    unsafe { std::env::set_var(name, value) };
}

/// One test, since the double is told what to do by the environment of the process.
#[test]
fn the_runner_drives_the_cuda_provider() {
    let Some(folders) = std::env::var_os("GLMSERVE_TEST_CUDA").map(PathBuf::from) else {
        eprintln!("skipped: GLMSERVE_TEST_CUDA names no folder; run `make test-cuda`");
        return;
    };
    for capability in ["7.5", "8.0", "8.9", "9.0"] {
        set("GLMSERVE_STUB_CAPABILITY", capability);
        // Turing has no bfloat16.
        for graph in GRAPHS.iter().filter(|graph| capability != "7.5" || !graph.contains("bf16")) {
            let (runner, vocab_size) = load(&folders.join(graph), &options()).expect(graph);
            serve(runner, vocab_size, graph);
            let (runner, vocab_size) = load(&folders.join(graph), &with_graphs()).expect(graph);
            serve(runner, vocab_size, graph);
            let (runner, _) = load(&folders.join(graph), &with_graphs()).expect(graph);
            decodes_are_captured_and_replayed(runner, graph);
            let five = OrtOptions { max_num_seqs: 5, ..with_graphs() };
            let (runner, _) = load(&folders.join(graph), &five).expect(graph);
            what_was_prepared_is_launched_at_once(runner, graph);
            let (runner, _) = load(&folders.join(graph), &with_graphs()).expect(graph);
            a_captured_step_is_one_launch_between_two_copies_and_waits_once(runner, graph);
        }
    }
    let fp16 = folders.join("fp16");
    a_cache_is_sized_by_what_is_left(&fp16, 1.0);
    // To expand a token in one of two layers takes as much as the token takes in both.
    a_cache_is_sized_by_what_is_left(&folders.join("fp16-kv-int8"), 0.5);
    a_failed_launch_ends_a_step_and_nothing_else(&fp16);
    words_are_clear(&folders, &fp16);
}

/// A step of so many sequences, each with one new token after `num_computed_tokens`.
fn decode(num_sequences: usize, num_computed_tokens: usize) -> StepPlan {
    let num_blocks = num_computed_tokens / BLOCK_SIZE + 1;
    let blocks: Vec<u32> = (0..num_blocks as u32).rev().collect();
    let mut plan = StepPlan::default();
    plan.clear(num_blocks);
    for id in 0..num_sequences as u64 {
        plan.push(RequestId(id), [5], num_computed_tokens, &blocks, BLOCK_SIZE, 1);
    }
    plan
}

/// What a step launches is told by what the double lets fail. Each kind of decode step is captured once, and from then
/// on a step launches the graph and nothing else; all other steps launch kernels and no graph.
fn decodes_are_captured_and_replayed(mut runner: OrtRunner, graph: &str) {
    let mut run = |plan: &StepPlan, failing: &str| {
        set("GLMSERVE_STUB_FAIL", failing);
        let rows = runner.run(plan).and_then(|mut output| {
            output
                .candidates
                .iter()
                .for_each(|candidates| assert_eq!(candidates.ids.nrows(), plan.logits_indices.len()));
            Ok(output.logits.rows()?.nrows())
        });
        set("GLMSERVE_STUB_FAIL", "");
        rows.map_err(|error| error.message)
    };
    let mut prompt = StepPlan::default();
    prompt.clear(1);
    prompt.push(RequestId(0), [1, 2, 3], 0, &[0], BLOCK_SIZE, 1);
    // A decode with two draft tokens, beside one without.
    let mut drafts = StepPlan::default();
    drafts.clear(1);
    drafts.push(RequestId(0), [1, 2, 3], 8, &[0], BLOCK_SIZE, 3);
    drafts.push(RequestId(1), [1], 8, &[1], BLOCK_SIZE, 1);
    // Other numbers of sequences that the same graph serves, and contexts beyond the first.
    for (first, later, context) in [(1, 1, 0), (3, 4, 140), (4, 3, 600), (50, 64, 140), (512, 385, 500)] {
        let what = format!("{graph}: {first} sequences of {context} tokens");
        let plan = decode(first, context);
        // Computed, captured, launched: a failure ends this step only, and the next one captures anew.
        assert!(run(&plan, "launch").is_err(), "{what}");
        assert!(run(&plan, "graph").is_err(), "{what}");
        assert_eq!(run(&plan, ""), Ok(first), "{what}");
        assert_eq!(run(&plan, "launch"), Ok(first), "{what}");
        assert_eq!(run(&decode(later, context + 1), "launch"), Ok(later), "{what}");
        assert_eq!(run(&prompt, "graph"), Ok(1), "{what}");
        assert_eq!(run(&drafts, "graph"), Ok(4), "{what}");
        assert_eq!(run(&decode(513, 7), "graph"), Ok(513), "{what}");
        assert!(run(&plan, "graph").is_err(), "{what}");
        assert_eq!(run(&plan, ""), Ok(first), "{what}");
    }
    assert!(run(&prompt, "launch").is_err(), "{graph}");
}

/// What the double saw of the runner's third step of a kind.
fn calls(runner: &mut OrtRunner, plan: &StepPlan) -> Vec<String> {
    let log = std::env::temp_dir().join(format!("glm-engine-cuda-calls-{}", std::process::id()));
    let mut calls = String::new();
    for _ in 0..3 {
        // A step may call nothing that is logged.
        std::fs::write(&log, "").expect("the log");
        set("GLMSERVE_STUB_LOG", log.to_str().expect("a path of plain letters"));
        runner.run(plan).expect("a step");
        set("GLMSERVE_STUB_LOG", "");
        calls = std::fs::read_to_string(&log).expect("the log");
    }
    let _ = std::fs::remove_file(&log);
    calls.lines().map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(" ")).collect()
}

fn a_captured_step_is_one_launch_between_two_copies_and_waits_once(mut runner: OrtRunner, graph: &str) {
    let download = if graph.ends_with("logits") { &[][..] } else { &["copy device-host"] };
    let expected = [&["copy host-device", "graph"], download, &["wait"]].concat();
    for (num_sequences, context) in [(1, 140), (5, 600), (300, 40)] {
        assert_eq!(calls(&mut runner, &decode(num_sequences, context)), expected, "{graph}");
    }
    // A row that is asked for comes alone.
    let log = std::env::temp_dir().join(format!("glm-engine-cuda-row-{}", std::process::id()));
    let mut output = runner.run(&decode(5, 600)).expect("a step");
    set("GLMSERVE_STUB_LOG", log.to_str().expect("a path of plain letters"));
    let num_bytes = size_of_val(output.logits.row(3).expect("a row"));
    set("GLMSERVE_STUB_LOG", "");
    let found = std::fs::read_to_string(&log).expect("the log");
    let _ = std::fs::remove_file(&log);
    assert_eq!(found, format!("copy device-host {num_bytes}\nwait\n"), "{graph}");
    assert!(output.logits.row(5).is_err(), "{graph}");
    // Other steps take no memory either, once they have run.
    let mut prompt = StepPlan::default();
    prompt.clear(1);
    prompt.push(RequestId(0), [1, 2, 3], 0, &[0], BLOCK_SIZE, 1);
    let found = calls(&mut runner, &prompt);
    assert!(!found.iter().any(|call| call.starts_with("malloc") || call == "free"), "{graph}: {found:?}");
    assert!(found.iter().filter(|call| *call == "wait").count() <= 1, "{graph}: {found:?}");
}

/// The cache takes what is left of a part of the memory.
fn a_cache_is_sized_by_what_is_left(folder: &Path, part_of_cache: f64) {
    set("GLMSERVE_STUB_MEMORY", &(2usize << 30).to_string());
    let options = |utilization| OrtOptions {
        kv_cache: KvCacheMemory::Utilization(utilization),
        device_memory_bytes: None,
        max_num_seqs: 8,
        ..with_graphs()
    };
    let mut sizes = Vec::new();
    for utilization in [0.5, 0.9] {
        let (mut runner, _) = load(folder, &options(utilization)).expect("a cache");
        sizes.push(runner.kv_cache().num_bytes);
        runner.prepare().expect("graphs");
        // Not a graph of the steps that were measured, which knew another cache.
        set("GLMSERVE_STUB_FAIL", "launch");
        assert_eq!(runner.run(&decode(8, 600)).map(drop), Ok(()));
        set("GLMSERVE_STUB_FAIL", "");
        assert_eq!(runner.run(&decode(20, 140)).map(drop), Ok(()));
    }
    // All but the margin of 256 MiB and what little the weights take.
    let expected = [0.5, 0.9].map(|part| part * (2u64 << 30) as f64 - (256 << 20) as f64);
    for (size, expected) in sizes.into_iter().zip(expected) {
        let ratio = size as f64 / (part_of_cache * expected);
        assert!((0.95..=1.0).contains(&ratio), "{size} of {expected}");
    }
    let error = load(folder, &options(0.1)).expect_err("too little").to_string();
    assert!(error.contains("no memory is left for the KV cache: of the GPU's 2048 MiB"), "{error}");
    set("GLMSERVE_STUB_MEMORY", &(80usize << 30).to_string());
}

/// For up to 5 sequences, which is the bucket of 8; a step of more is not captured.
fn what_was_prepared_is_launched_at_once(mut runner: OrtRunner, graph: &str) {
    set("GLMSERVE_STUB_FAIL", "launch");
    let error = runner.prepare().expect_err("a launch failed").to_string();
    assert!(error.contains("CUDA"), "{error}");
    set("GLMSERVE_STUB_FAIL", "");
    runner.prepare().expect(graph);
    set("GLMSERVE_STUB_FAIL", "launch");
    for (num_sequences, context) in [(1, 0), (1, 600), (2, 140), (4, 600), (7, 140), (8, 600)] {
        let found = runner.run(&decode(num_sequences, context)).map(drop);
        assert_eq!(found.map_err(|error| error.message), Ok(()), "{graph}: {num_sequences} of {context}");
    }
    assert!(runner.run(&decode(9, 140)).is_err(), "{graph}");
    set("GLMSERVE_STUB_FAIL", "");
    assert!(runner.run(&decode(9, 140)).is_ok(), "{graph}");
}

/// Prompts in chunks, beside decodes, with and without need of whole rows.
fn serve(runner: OrtRunner, vocab_size: usize, graph: &str) {
    let config = EngineConfig { max_num_batched_tokens: 64, max_model_len: 512, ..EngineConfig::default() };
    let mut engine = Engine::new(runner, config, vocab_size);
    let greedy = SamplingParams { temperature: 0.0, max_tokens: 3, ..SamplingParams::default() };
    let params = [
        greedy.clone(),
        SamplingParams { repetition_penalty: 1.1, ..greedy.clone() },
        SamplingParams { temperature: 0.8, top_p: 0.8, ..greedy },
    ];
    for (sampling, length) in params.into_iter().zip([3, 150, 20]) {
        let request = Request { prompt_token_ids: vec![7; length], sampling, ..Request::default() };
        engine.submit(request, Duration::ZERO);
    }
    let mut finished = 0;
    for step in 0..40 {
        let report = engine.step(Duration::from_millis(step), 64);
        assert!(!report.failed, "{graph}: {:?}", engine.events());
        for (id, event) in engine.events() {
            match event {
                TokenEvent::Token { token_id } if id.0 == 0 => assert_eq!(*token_id, 0, "{graph}"),
                TokenEvent::Finished { reason, .. } => {
                    assert_eq!(*reason, FinishReason::Length, "{graph}");
                    finished += 1;
                }
                TokenEvent::Failed(error) => panic!("{graph}: {error}"),
                _ => {}
            }
        }
    }
    assert_eq!(finished, 3, "{graph}");
    assert!(engine.is_idle(), "{graph}");
}

fn a_failed_launch_ends_a_step_and_nothing_else(folder: &Path) {
    let (mut runner, _) = load(folder, &options()).unwrap();
    let mut plan = StepPlan::default();
    plan.clear(1);
    plan.push(RequestId(0), [1, 2, 3], 0, &[0], 128, 1);
    set("GLMSERVE_STUB_FAIL", "launch");
    let error = runner.run(&plan).expect_err("a launch failed").message;
    assert!(error.contains("CUDA"), "{error}");
    set("GLMSERVE_STUB_FAIL", "");
    let mut output = runner.run(&plan).unwrap();
    assert_eq!(output.candidates.expect("the graph has candidates").row(0).unwrap().ids.len(), 64);
    let rows = output.logits.rows().unwrap();
    assert_eq!((rows.nrows(), rows.iter().all(|value| *value == 0.0)), (1, true));
}

fn words_are_clear(folders: &Path, fp16: &Path) {
    let words = |folder: &Path, options: &OrtOptions| match load(folder, options) {
        Ok(_) => panic!("{} was loaded", folder.display()),
        Err(error) => error.to_string(),
    };
    let negative = words(&folders.join("unique"), &options());
    assert!(negative.contains("a node of the graph has no CUDA kernel"), "{negative}");
    let tight = OrtOptions { device_memory_bytes: Some(4 << 20), ..options() };
    let error = words(fp16, &tight);
    assert!(error.contains("does not fit the device's memory"), "{error}");
    let error = words(fp16, &OrtOptions { device_id: Some(7), ..options() });
    assert!(error.contains("driver of version 580"), "{error}");
    for (capability, driver, expected) in [
        ("7.0", "13000", "no code for compute capability 7.0"),
        (
            "10.0",
            "13000",
            "no code for compute capability 10.0, only for 7.5, 8.x, 9.0 and 12.0 (CUDA stub, GPU-",
        ),
        ("9.0", "12080", "the NVIDIA driver is for CUDA 12.8"),
    ] {
        set("GLMSERVE_STUB_CAPABILITY", capability);
        set("GLMSERVE_STUB_DRIVER", driver);
        let error = words(fp16, &options());
        assert!(error.contains(expected), "{error}");
    }
    set("GLMSERVE_STUB_CAPABILITY", "9.0");
    set("GLMSERVE_STUB_DRIVER", "");
    let negative = words(&folders.join("unique"), &with_graphs());
    assert!(negative.contains("a node of the graph has no CUDA kernel"), "{negative}");
    println!("negative control: {negative}");
}
