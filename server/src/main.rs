//! The `glmserve` program: reads the command line and hands over to the library.

use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;

use actix_web::web;
use glm_engine::model::known_answer::Agreement;
use glm_engine::runner::ModelRunner;
use glm_engine::runner::ort::OrtRunner;
use glm_engine::{EngineConfig, EngineThread, LoadError, Manifest, RunError};
use glmserve::auth::ApiKeys;
use glmserve::config::{CheckArgs, Cli, Command, LogFormat, LogitsArgs, ModelArgs, ServeArgs};
use glmserve::known_answer::VerifyError;
use glmserve::lifecycle::{Lifecycle, Loaded};
use glmserve::metrics::Metrics;
use glmserve::state::ServedModel;
use glmserve::{ENGINE_FAILED_EXIT_CODE, LoadFailure, ServeError, check, known_answer, npy, serve, shutdown};
use glmserve_client::bench::{self, BenchArgs};
use glmserve_client::terminal::{self, ChatArgs};
use tracing_subscriber::EnvFilter;

type MainResult<T = ()> = Result<T, LoadFailure>;

fn main() -> ExitCode {
    // ONNX Runtime's own telemetry, which writes a device id before any session can turn it off.
    // SAFETY: no other thread exists yet that could read the environment.
    unsafe { std::env::set_var("ORT_DISABLE_TELEMETRY", "1") };
    let result = match Cli::read().command {
        Command::Serve(args) => run_server(*args),
        Command::Check(args) => check_folder(&args),
        Command::Logits(args) => write_logits(&args),
        Command::Bench(args) => run_bench(args),
        Command::Chat(args) => run_chat(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not eprintln: it panics when nobody takes what it prints.
            let _ = writeln!(std::io::stderr(), "glmserve: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_server(args: ServeArgs) -> MainResult {
    start_log(args.log_format)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut thread = None;
    let result = runtime.block_on(async {
        // Before everything else: the first process of a container has no other way to hear a signal.
        let signals = shutdown::signals()?;
        let Prepared { listener, lifecycle, manifest, config, kv_cache_bytes } = prepare(&args)?;
        let metrics = Arc::clone(&lifecycle.metrics);
        let loading = async {
            let load = move || load(&args, manifest, config, kv_cache_bytes, metrics);
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
    kv_cache_bytes: usize,
}

/// Does what is quick, so that a mistake in the configuration is told at once, and binds the port.
fn prepare(args: &ServeArgs) -> MainResult<Prepared> {
    let keys = args.api_key_file.as_ref().map(|path| {
        ApiKeys::load(path)
            .map_err(|error| format!("cannot use the API key file {}: {error}", path.display()))
    });
    let keys = keys.transpose()?;
    let manifest = Manifest::load(&args.model.model)?;
    let config = args.scheduling.engine_config(&manifest, keys.as_ref())?;
    let kv_cache_bytes = args.model.kv_cache_bytes(&manifest)?;
    let address = SocketAddr::from((args.host, args.port));
    let listener =
        TcpListener::bind(address).map_err(|error| format!("cannot listen on {address}: {error}"))?;
    tracing::info!(address = %listener.local_addr()?, model = manifest.model.name, "listening, loading the model");
    // The KV cache may hold less than this; then fewer events are used.
    let options = args.http_options(config.max_model_len);
    let lifecycle = web::Data::new(Lifecycle::new(options, Arc::new(Metrics::new(&manifest)?), keys));
    Ok(Prepared { listener, lifecycle, manifest, config, kv_cache_bytes })
}

/// Does what may take minutes.
fn load(
    args: &ServeArgs,
    manifest: Manifest,
    config: EngineConfig,
    kv_cache_bytes: usize,
    metrics: Arc<Metrics>,
) -> MainResult<(Loaded, EngineThread)> {
    let model = ServedModel::load(&args.model.model, manifest, &args.served_model_name)?;
    if !model.chat.has_chat() {
        tracing::warn!("this is a base model without a chat format: chat completions are refused");
    }
    let mut runner = load_runner(&args.model, &model.manifest, kv_cache_bytes)?;
    let cache = runner.kv_cache();
    let capacity = cache.num_blocks * cache.block_size;
    if config.max_model_len > capacity {
        let message = format!(
            "--kv-cache-memory holds {capacity} tokens, a sequence may have {}",
            config.max_model_len
        );
        match args.scheduling.max_model_len {
            Some(_) => return Err(message.into()),
            None => tracing::warn!("{message}: longer ones are refused"),
        }
    }
    let agreement = match known_answer::verify(&mut runner, &args.model.model, &model.manifest) {
        Ok(agreement) => agreement,
        Err(error) => {
            if matches!(error, VerifyError::Run(RunError { is_permanent: true, .. })) {
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
        "loaded"
    );
    Ok((Loaded { model, engine }, thread))
}

fn load_runner(args: &ModelArgs, manifest: &Manifest, kv_cache_bytes: usize) -> Result<OrtRunner, LoadError> {
    OrtRunner::load(&args.model, manifest, &args.runtime.options(kv_cache_bytes))
}

fn check_folder(args: &CheckArgs) -> MainResult {
    // Not eprintln, as above; nobody may listen.
    let mut progress = |line: &str| drop(writeln!(std::io::stderr(), "{line}"));
    let options = |kv_cache_bytes| args.runtime.options(kv_cache_bytes);
    let num_wrong = check::run(&args.dir, options, &mut std::io::stdout(), &mut progress)?;
    match num_wrong {
        0 => Ok(()),
        _ => Err(format!("{}: {num_wrong} of the above are wrong", args.dir.display()).into()),
    }
}

fn write_logits(args: &LogitsArgs) -> MainResult {
    let manifest = Manifest::load(&args.model.model)?;
    let kv_cache_bytes = args.model.kv_cache_bytes(&manifest)?;
    // Before the model, which may take minutes.
    let file =
        File::create(&args.out).map_err(|error| format!("cannot write {}: {error}", args.out.display()))?;
    let mut runner = load_runner(&args.model, &manifest, kv_cache_bytes)?;
    let logits = glm_engine::runner::logits(&mut runner, &args.ids, args.chunk.unwrap_or(args.ids.len()))?;
    let mut out = BufWriter::new(file);
    npy::write(&mut out, logits.view())?;
    Ok(out.flush()?)
}

fn run_bench(args: BenchArgs) -> MainResult {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(bench::run(args))?;
    println!("{report}");
    match report.is_clean() {
        true => Ok(()),
        false => Err("not every stream came whole; the figures above are of those that did".into()),
    }
}

fn run_chat(args: ChatArgs) -> MainResult {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(terminal::run(args))?)
}

fn start_log(format: LogFormat) -> MainResult {
    let log = tracing_subscriber::fmt()
        .with_env_filter(log_filter()?)
        .with_ansi(std::io::stderr().is_terminal())
        // It would print its own failures and panic if that fails too: a lost log must not cost a reply.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

/// What RUST_LOG says, or the default where it is unset or empty.
fn log_filter() -> MainResult<EnvFilter> {
    let text = std::env::var_os("RUST_LOG").unwrap_or_default();
    let text = text.to_str().ok_or("RUST_LOG is not UTF-8 text")?;
    let text = if text.is_empty() { "info,ort=warn,actix_server=warn" } else { text };
    EnvFilter::try_new(text).map_err(|error| format!("RUST_LOG={text:?} can't be read: {error}").into())
}
