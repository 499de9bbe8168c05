//! Measures what a decode step costs outside ONNX Runtime's run: binding, reading, and everything between two steps.
//!
//! `cargo run --release -p glm-engine --example step_overhead -- MODEL_DIR [--threads N] [--tokens N] [--sampled]`
//! with `GLMSERVE_ORT_LIB` set. The engine thread runs as it does in the server, over a runner that takes times.
//! Only steps in which every sequence decodes count; medians are printed, since a busy machine disturbs few
//! steps, or all. Allocations are Rust's: the library has an allocator of its own.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use counting_allocator::num_allocations_so_far;
use glm_engine::runner::ort::{OrtOptions, OrtRunner};
use glm_engine::runner::{KvCacheLayout, ModelRunner};
use glm_engine::{
    EngineConfig, EngineThread, Manifest, NoObserver, Request, RunError, SamplingParams, StepOutput, StepPlan,
};

/// Rows of the table.
const NUM_SEQUENCES: [usize; 3] = [1, 16, 64];
const NUM_PROMPT_TOKENS: usize = 32;
/// The first steps fill buffers.
const NUM_WARM: usize = 4;

/// A moment of the engine's thread: since the start, and after how many of its allocations.
#[derive(Clone, Copy)]
struct Mark(Duration, u64);

/// When a step was handed over, bound, computed and read.
struct Step {
    num_sequences: usize,
    marks: [Mark; 4],
}

/// Takes the times of a runner.
struct Timed {
    inner: OrtRunner,
    epoch: Instant,
    steps: Arc<Mutex<Vec<Step>>>,
}

impl Timed {
    fn mark(&self) -> Mark {
        Mark(self.epoch.elapsed(), num_allocations_so_far())
    }
}

impl ModelRunner for Timed {
    fn kv_cache(&self) -> KvCacheLayout {
        self.inner.kv_cache()
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput<'_>, RunError> {
        let handed_over = self.mark();
        self.inner.bind(plan)?;
        let bound = self.mark();
        self.inner.compute()?;
        let computed = self.mark();
        self.inner.output()?;
        let read = self.mark();
        if plan.num_tokens() == plan.sequences.len() {
            let step =
                Step { num_sequences: plan.sequences.len(), marks: [handed_over, bound, computed, read] };
            self.steps.lock().expect("one thread writes, and before the other reads").push(step);
        }
        self.inner.output()
    }
}

struct Options {
    dir: PathBuf,
    num_threads: usize,
    num_tokens: usize,
    sampling: SamplingParams,
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = options().ok_or("usage: step_overhead MODEL_DIR [--threads N] [--tokens N] [--sampled]")?;
    println!(
        "| sequences | steps | step ms | bind us | read us | engine us | outside us | share | allocations outside | inside |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for num_sequences in NUM_SEQUENCES {
        let steps = measure(&options, num_sequences)?;
        println!("{}", row(num_sequences, &steps));
    }
    Ok(())
}

fn options() -> Option<Options> {
    let mut arguments = std::env::args().skip(1);
    let sampling = SamplingParams { temperature: 0.0, ignore_eos: true, ..SamplingParams::default() };
    let mut options = Options { dir: arguments.next()?.into(), num_threads: 2, num_tokens: 64, sampling };
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--threads" => options.num_threads = arguments.next()?.parse().ok()?,
            "--tokens" => options.num_tokens = arguments.next()?.parse().ok()?,
            // As ChatGLM3's authors sample.
            "--sampled" => (options.sampling.temperature, options.sampling.top_p) = (0.8, 0.8),
            _ => return None,
        }
    }
    Some(options)
}

/// Lets so many sequences decode at once.
fn measure(options: &Options, num_sequences: usize) -> Result<Vec<Step>, Box<dyn Error>> {
    let manifest = Manifest::load(&options.dir)?;
    let runner = Timed {
        inner: load(&options.dir, &manifest, options.num_threads)?,
        epoch: now(),
        // So that keeping a step allocates nothing.
        steps: Arc::new(Mutex::new(Vec::with_capacity(2 * options.num_tokens))),
    };
    let steps = Arc::clone(&runner.steps);
    let config = EngineConfig {
        max_num_seqs: num_sequences,
        max_model_len: NUM_PROMPT_TOKENS + options.num_tokens,
        max_num_batched_tokens: 512,
        max_step_time: Duration::from_secs(60),
        ..EngineConfig::default()
    };
    let vocab_size = manifest.geometry.vocab_size;
    let (handle, thread) = EngineThread::spawn(runner, config, vocab_size, Arc::new(NoObserver))?;
    let sampling = SamplingParams { max_tokens: options.num_tokens, ..options.sampling.clone() };
    let receivers = (0..num_sequences as u32).map(|first| {
        let prompt_token_ids = (first..first + NUM_PROMPT_TOKENS as u32).collect();
        handle.submit(Request { prompt_token_ids, sampling: sampling.clone(), ..Request::default() })
    });
    let receivers = receivers.collect::<Result<Vec<_>, _>>()?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    for mut receiver in receivers {
        runtime.block_on(async { while receiver.recv().await.is_some() {} });
    }
    drop(handle);
    thread.join();
    let mut steps = std::mem::take(&mut *steps.lock().expect("the thread ended"));
    steps.retain(|step| step.num_sequences == num_sequences);
    Ok(steps.split_off(NUM_WARM.min(steps.len())))
}

fn load(dir: &Path, manifest: &Manifest, num_threads: usize) -> Result<OrtRunner, Box<dyn Error>> {
    let library = std::env::var_os("GLMSERVE_ORT_LIB").ok_or("GLMSERVE_ORT_LIB is not set")?;
    let options = OrtOptions::new(library.into(), num_threads, 512 << 20);
    Ok(OrtRunner::load(dir, manifest, &options)?)
}

#[allow(clippy::disallowed_methods, reason = "the measurement's only clock")]
fn now() -> Instant {
    Instant::now()
}

/// A row of the table: medians over pairs of successive steps.
fn row(num_sequences: usize, steps: &[Step]) -> String {
    let mut columns: [Vec<f64>; 7] = Default::default();
    for pair in steps.windows(2) {
        let [_, _, _, read_before] = pair[0].marks;
        let [handed_over, bound, computed, read] = pair[1].marks;
        let micros = |from: Mark, to: Mark| (to.0 - from.0).as_secs_f64() * 1e6;
        let (step, run) = (micros(read_before, read), micros(bound, computed));
        let num_inside = computed.1 - bound.1;
        let num_outside = read.1 - read_before.1 - num_inside;
        let (bind, reading, engine) =
            (micros(handed_over, bound), micros(computed, read), micros(read_before, handed_over));
        let figures = [step, bind, reading, engine, step - run, num_outside as f64, num_inside as f64];
        columns.iter_mut().zip(figures).for_each(|(column, figure)| column.push(figure));
    }
    let [step, bind, reading, engine, outside, num_outside, num_inside] = columns.map(median);
    format!(
        "| {num_sequences} | {} | {:.2} | {bind:.1} | {reading:.1} | {engine:.1} | {outside:.1} | {:.2} % | {num_outside} | {num_inside} |",
        steps.len(),
        step / 1000.0,
        100.0 * outside / step,
    )
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}
