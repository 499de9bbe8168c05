//! Owns `glmserve serve`: from the command line to a server that runs, and to the exit.
//!
//! Invariant: a mistake in the configuration that can be found without the model is told before the port is bound.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use actix_web::web;
use glm_engine::model::known_answer::Agreement;
use glm_engine::runner::ModelRunner;
use glm_engine::runner::ort::{OrtOptions, OrtRunner};
use glm_engine::{EngineConfig, EngineThread, Manifest};

use super::log;
use crate::api_keys::ApiKeys;
use crate::config::ServeArgs;
use crate::engine_failure::ENGINE_FAILED_EXIT_CODE;
use crate::gpu;
use crate::lifecycle::{Lifecycle, Loaded};
use crate::metrics::Metrics;
use crate::serve::serve;
use crate::serve_error::{LoadFailure, ServeError};
use crate::served_model::ServedModel;
use crate::shutdown;
use crate::verify::{VerifyError, verify};

pub(super) fn run(args: ServeArgs) -> Result<(), LoadFailure> {
    log::start(args.log_format)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut thread = None;
    let result = runtime.block_on(async {
        // Before everything else: the first process of a container has no other way to hear a signal.
        let signals = shutdown::signals()?;
        let Prepared { listener, lifecycle, manifest, config, options } = prepare(&args)?;
        let metrics = Arc::clone(&lifecycle.metrics);
        let loading = async {
            let load = move || load(&args, manifest, config, &options, metrics);
            let (loaded, engine_thread) = tokio::task::spawn_blocking(load).await??;
            thread = Some(engine_thread);
            Ok::<_, LoadFailure>(loaded)
        };
        Ok::<_, LoadFailure>(serve(listener, lifecycle, loading, signals).await?)
    });
    if let Err(error) = &result
        && let Some(error) = error.downcast_ref::<ServeError>()
        && error.is_engine_failure()
    {
        end_at_once(error);
    }
    // Whoever stops a server that is loading does not wait for the model.
    runtime.shutdown_background();
    if let Some(thread) = thread {
        thread.join();
    }
    result
}

/// Ends the process without a word to the device or to ONNX Runtime: their exit handlers can hang or abort
/// when the device has failed, and then the exit code would be lost.
fn end_at_once(error: &ServeError) -> ! {
    let _ = writeln!(std::io::stderr(), "glmserve: {error}");
    // SAFETY: ends the process; nothing is buffered that has to be written.
    unsafe { libc::_exit(i32::from(ENGINE_FAILED_EXIT_CODE)) }
}

/// What is known before the model is loaded.
struct Prepared {
    listener: TcpListener,
    lifecycle: web::Data<Lifecycle>,
    manifest: Manifest,
    config: EngineConfig,
    options: OrtOptions,
}

/// Does what is quick, so that a mistake in the configuration is told at once, and binds the port.
fn prepare(args: &ServeArgs) -> Result<Prepared, LoadFailure> {
    let keys = args.api_key_file.as_ref().map(|path| {
        ApiKeys::load(path)
            .map_err(|error| format!("cannot use the API key file {}: {error}", path.display()))
    });
    let keys = keys.transpose()?;
    let manifest = Manifest::load(&args.model.model)?;
    let config = args.scheduling.engine_config(&manifest, keys.as_ref())?;
    let options = args.ort_options(&manifest, &config)?;
    let address = SocketAddr::from((args.host, args.port));
    let listener =
        TcpListener::bind(address).map_err(|error| format!("cannot listen on {address}: {error}"))?;
    tracing::info!(address = %listener.local_addr()?, model = manifest.model.name, "listening, loading the model");
    // The KV cache may hold less than this; then fewer events are used.
    let http_options = args.http_options(config.max_model_len);
    let lifecycle = web::Data::new(Lifecycle::new(http_options, Arc::new(Metrics::new(&manifest)?), keys));
    Ok(Prepared { listener, lifecycle, manifest, config, options })
}

/// Does what may take minutes.
fn load(
    args: &ServeArgs,
    manifest: Manifest,
    config: EngineConfig,
    options: &OrtOptions,
    metrics: Arc<Metrics>,
) -> Result<(Loaded, EngineThread), LoadFailure> {
    let model = ServedModel::load(&args.model.model, manifest, &args.served_model_name)?;
    if !model.chat.has_chat() {
        tracing::warn!("this is a base model without a chat format: chat completions are refused");
    }
    let mut runner = OrtRunner::load(&args.model.model, &model.manifest, options)?;
    if let Some(uuid) = runner.gpu_uuid() {
        gpu::watch(uuid, &metrics);
    }
    let cache = runner.kv_cache();
    let capacity = cache.num_blocks * cache.block_size;
    if config.max_model_len > capacity {
        let message = format!(
            "the KV cache holds {capacity} tokens (--kv-cache-memory, --gpu-memory-utilization), a sequence may have {}",
            config.max_model_len
        );
        match args.scheduling.max_model_len {
            Some(_) => return Err(message.into()),
            None => tracing::warn!("{message}: longer ones are refused"),
        }
    }
    let agreement = match verify(&mut runner, &args.model.model, &model.manifest) {
        Ok(agreement) => agreement,
        Err(error) => {
            if matches!(&error, VerifyError::Run(error) if error.is_permanent()) {
                // To take its session down, ONNX Runtime would call the failed device: see `end_at_once`.
                std::mem::forget(runner);
            }
            return Err(error.into());
        }
    };
    match agreement {
        Some(Agreement { error, tolerance }) => {
            tracing::info!(error, tolerance, "computes what was exported")
        }
        None => tracing::warn!(
            "the folder has no known answer, so nothing shows that this machine computes what was exported: \
             export again with the glm-export of this release"
        ),
    }
    let vocab_size = model.manifest.geometry.vocab_size;
    let (engine, thread) = EngineThread::spawn(runner, config, vocab_size, metrics)?;
    let limits = engine.limits();
    tracing::info!(
        model = model.names.join(","),
        digest = model.manifest.digest,
        max_model_len = limits.max_model_len,
        kv_cache_mib = limits.kv_cache_bytes >> 20,
        kv_cache_tokens = capacity,
        longest_sequences = capacity / limits.max_model_len.max(1),
        "loaded"
    );
    Ok((Loaded { model, engine }, thread))
}
