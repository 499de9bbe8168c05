//! Owns `glmserve plan`: what a folder takes of memory, and how many sequences find room in the rest.

use std::io::{self, Write};

use glm_engine::model::manifest::Provider;
use glm_engine::runner::KvCacheLayout;
use glm_engine::runner::ort::sizing;
use glm_engine::{LoadError, Manifest};

use crate::config::PlanArgs;
use crate::serve_error::LoadFailure;

const MIB: usize = 1 << 20;
/// Lengths of sequences that are told unless others are asked for, and the model's longest.
const LENGTHS: [usize; 4] = [512, 2048, 8192, 32_768];

pub(super) fn run(args: &PlanArgs) -> Result<(), LoadFailure> {
    let manifest = Manifest::load(&args.dir)?;
    plan(args, &manifest, &mut io::stdout())
}

fn plan(args: &PlanArgs, manifest: &Manifest, out: &mut impl Write) -> Result<(), LoadFailure> {
    let (model, graph) = (&manifest.model.name, &manifest.graph);
    let step = args.steps.largest_step(manifest)?;
    let cache = cache(args, manifest, step)?;
    let KvCacheLayout { num_blocks, block_size, num_bytes } = cache;
    let weights = sizing::weight_bytes(manifest) as usize;
    writeln!(out, "model       {model}, {}, {}", graph.precision, manifest.digest)?;
    writeln!(out, "weights     {} MiB", weights.div_ceil(MIB))?;
    let mut total = weights + num_bytes;
    if graph.provider == Provider::Cuda {
        let bytes = sizing::step_bytes(&manifest.geometry, step.0, step.1);
        total += bytes;
        let (sequences, tokens) = step;
        writeln!(
            out,
            "steps       about {} MiB, of up to {sequences} sequences and {tokens} tokens",
            bytes.div_ceil(MIB)
        )?;
    }
    let per_token = sizing::bytes_per_token(manifest);
    let num_tokens = num_blocks * block_size;
    writeln!(
        out,
        "KV cache    {} MiB, {num_tokens} tokens of {per_token} bytes, in blocks of {block_size}",
        num_bytes / MIB
    )?;
    writeln!(out, "altogether  {} MiB, and what the process and its libraries take", total.div_ceil(MIB))?;
    let longest = manifest.geometry.max_model_len;
    let mut lengths = match args.context.as_slice() {
        [] => LENGTHS.into_iter().filter(|&length| length < longest).chain([longest]).collect(),
        given => given.to_vec(),
    };
    lengths.sort_unstable();
    for length in lengths {
        let note = if length > longest { ", which the model does not read" } else { "" };
        let count = num_blocks / length.div_ceil(block_size);
        writeln!(out, "sequences   {count} of {length} tokens{note}")?;
    }
    Ok(())
}

fn cache(
    args: &PlanArgs,
    manifest: &Manifest,
    (max_num_seqs, max_num_tokens): (usize, usize),
) -> Result<KvCacheLayout, LoadError> {
    match (args.kv_cache_memory, manifest.graph.provider, args.gpu_memory) {
        (Some(mib), ..) => sizing::kv_cache(manifest, mib * MIB),
        (None, Provider::Cpu, _) => sizing::kv_cache(manifest, args.default_kv_cache_memory() * MIB),
        (None, Provider::Cuda, Some(mib)) => {
            let utilization = args.utilization();
            sizing::kv_cache_of_gpu(manifest, mib * MIB, utilization, max_num_seqs, max_num_tokens)
        }
        (None, Provider::Cuda, None) => Err(LoadError::Config(
            "name the GPU's memory, as --gpu-memory 81920, or the cache's, as --kv-cache-memory 8192".into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::config::{Cli, Command};
    use crate::fixtures;

    fn planned(arguments: &[&str], provider: Provider) -> Result<String, String> {
        let arguments = ["glmserve", "plan", "m"].iter().chain(arguments);
        let Command::Plan(args) = Cli::try_parse_from(arguments).map_err(|error| error.to_string())?.command
        else {
            panic!("another command");
        };
        let mut manifest = fixtures::chatglm3().manifest();
        manifest.graph.provider = provider;
        let mut out = Vec::new();
        plan(&args, &manifest, &mut out).map_err(|error| error.to_string())?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn what_a_folder_takes_is_told_for_each_length() {
        let found = planned(&["--kv-cache-memory", "64", "--context", "100,33"], Provider::Cpu).unwrap();
        let lines: Vec<&str> = found.lines().collect();
        assert!(lines[2].starts_with("KV cache    6") && lines[2].contains(" MiB, "), "{found}");
        assert!(lines[4].ends_with(" of 33 tokens") && lines[5].ends_with(" of 100 tokens"), "{found}");
        let count = |line: &str| line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap();
        assert!(count(lines[4]) > count(lines[5]) && count(lines[5]) > 0, "{found}");
    }

    #[test]
    fn a_gpu_shares_its_memory_out_as_at_the_start() {
        let tokens = |arguments: &[&str]| {
            let found = planned(arguments, Provider::Cuda).unwrap();
            let line = found.lines().find(|line| line.starts_with("KV cache")).unwrap().to_owned();
            line.split_whitespace().nth(4).unwrap().parse::<usize>().unwrap()
        };
        let half = tokens(&["--gpu-memory", "8192", "--gpu-memory-utilization", "0.5"]);
        let most = tokens(&["--gpu-memory", "8192"]);
        assert!(most > half && half > 0, "{most}, {half}");
        assert!(tokens(&["--gpu-memory", "8192", "--max-num-seqs", "8"]) >= most);
        let error = planned(&[], Provider::Cuda).unwrap_err();
        assert!(error.contains("--gpu-memory 81920"), "{error}");
        let error = planned(&["--gpu-memory", "10"], Provider::Cuda).unwrap_err();
        assert!(error.contains("no memory is left for the KV cache"), "{error}");
    }
}
