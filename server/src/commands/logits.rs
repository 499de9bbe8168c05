//! Owns `glmserve logits`: the logits of a prompt, as a file for NumPy.

use std::fs::File;
use std::io::{BufWriter, Write};

use glm_engine::Manifest;
use glm_engine::runner::ort::OrtRunner;

use super::npy;
use crate::config::LogitsArgs;
use crate::serve_error::LoadFailure;

pub(super) fn run(args: &LogitsArgs) -> Result<(), LoadFailure> {
    let manifest = Manifest::load(&args.model.model)?;
    let kv_cache_bytes = args.model.kv_cache_bytes(&manifest)?;
    // Before the model, which may take minutes.
    let file =
        File::create(&args.out).map_err(|error| format!("cannot write {}: {error}", args.out.display()))?;
    let mut runner =
        OrtRunner::load(&args.model.model, &manifest, &args.model.runtime.options(kv_cache_bytes))?;
    let logits = glm_engine::runner::logits(&mut runner, &args.ids, args.chunk.unwrap_or(args.ids.len()))?;
    let mut out = BufWriter::new(file);
    npy::write(&mut out, logits.view())?;
    Ok(out.flush()?)
}
