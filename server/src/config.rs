//! Owns the command line: options, their variables, units and defaults.
//!
//! Invariant: defaults give way to the environment, and the environment to flags.

#[cfg(test)]
mod documentation;
mod environment;
mod http;
mod http_options;
mod scheduling;
mod values;

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use glm_engine::model::manifest::Provider;
use glm_engine::runner::ort::{KvCacheMemory, OrtOptions};
use glm_engine::{EngineConfig, LoadError, Manifest};
use glmserve_bench::BenchArgs;
use glmserve_client::terminal::ChatArgs;

pub use self::http::{ConnectionArgs, StreamArgs};
pub use self::scheduling::{SchedulingArgs, StepArgs};
use self::values::{MIB, part, port, up_to};
use crate::memory_budget::MemoryNeed;
use crate::origin::AllowedOrigins;

/// A streaming, OpenAI-compatible server for ChatGLM3 and its family.
#[derive(Debug, Parser)]
#[command(
    name = "glmserve",
    version,
    max_term_width = 110,
    after_help = "An empty variable is an unset one; the variables of flags take 1, true, yes, on or 0, false, no, off.\n\
                  GLMSERVE_SIMD=portable|avx2|avxvnni|avx512|amx forces the CPU's instruction set [default: the best]\n\n\
                  Exit codes: 1 for an error, 2 for a command line that is not understood, 70 for an engine that failed \
                  while it served and that only a new process heals"
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// The whole command line, by the rules of the environment.
    pub fn command_line() -> clap::Command {
        environment::apply(Self::command(), &|name| std::env::var_os(name))
    }

    /// Reads the arguments and the environment of this process, which ends with a message if they are wrong.
    pub fn read() -> Self {
        let matches = Self::command_line().get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model folder over HTTP
    Serve(Box<ServeArgs>),
    /// Check that a model folder is whole and that this machine computes what was exported
    Check(CheckArgs),
    /// Say what a model folder takes of memory, and how many sequences find room
    Plan(PlanArgs),
    /// Write the logits of every position of a sequence, for parity checks
    Logits(LogitsArgs),
    /// Measure a running server with streams in a closed loop
    Bench(BenchArgs),
    /// Chat with a running server in the terminal
    Chat(ChatArgs),
}

/// The model and how to run it.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Folder that glm-export wrote
    #[arg(long, env = "GLMSERVE_MODEL", value_name = "DIR")]
    pub model: PathBuf,
    /// What computes.
    #[command(flatten)]
    pub runtime: RuntimeArgs,
    /// Memory of the KV cache, in MiB. What does not fit the memory of the machine or of the control group beside the
    /// weights is refused [default: 1024; for a server with a graph of the CUDA provider what --gpu-memory-utilization
    /// leaves]
    #[arg(long, env = "GLMSERVE_KV_CACHE_MEMORY", value_name = "MIB", value_parser = up_to::<{ 1 << 24 }>)]
    pub kv_cache_memory: Option<usize>,
}

/// What computes.
#[derive(Debug, Args)]
pub struct RuntimeArgs {
    /// The ONNX Runtime shared library
    #[arg(long, env = "GLMSERVE_ORT_LIB", value_name = "FILE", default_value = "libonnxruntime.so")]
    pub onnxruntime: PathBuf,
    /// Threads that compute [default: the processors that this process may use, by its affinity and by the quota of its
    /// control group]
    #[arg(long, env = "GLMSERVE_THREADS", value_name = "N", value_parser = up_to::<1024>)]
    pub threads: Option<usize>,
    /// Number of the GPU, for a graph of the CUDA provider [default: 0]
    #[arg(long, env = "GLMSERVE_DEVICE", value_name = "N", value_parser = clap::value_parser!(i32).range(0..=1023))]
    pub device: Option<i32>,
    /// Memory of the GPU that weights, KV cache and everything else may take, in MiB, for a graph of the
    /// CUDA provider; needs --kv-cache-memory [default: all]
    #[arg(long, env = "GLMSERVE_GPU_MEMORY", value_name = "MIB", value_parser = up_to::<{ 1 << 24 }>)]
    pub gpu_memory: Option<usize>,
    /// Launch every kernel by itself, no CUDA graphs of decode steps, for a graph of the CUDA provider
    #[arg(long, env = "GLMSERVE_ENFORCE_EAGER")]
    pub enforce_eager: bool,
    /// Compute the same bits on every processor, for int4 and int8 graphs of the CPU provider: attention does
    /// without AMX, the only instructions with bits of their own (prompts take longer where there are any)
    #[arg(long, env = "GLMSERVE_BIT_EXACT")]
    pub bit_exact: bool,
}

/// Options of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The model and how to run it.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Part of the GPU's memory that may be taken, by this process and others, for a graph of the CUDA provider: the KV
    /// cache gets what the weights and the largest step leave of it, unless --kv-cache-memory says how much [default:
    /// 0.9]
    #[arg(long, env = "GLMSERVE_GPU_MEMORY_UTILIZATION", value_name = "PART", value_parser = part)]
    pub gpu_memory_utilization: Option<f64>,
    /// Address to listen on
    #[arg(long, env = "GLMSERVE_HOST", default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, env = "GLMSERVE_PORT", default_value_t = 8000, value_parser = port)]
    pub port: u16,
    /// Names that requests may use besides the model's own; repeatable
    #[arg(long, env = "GLMSERVE_SERVED_MODEL_NAME", value_name = "NAME,..", value_delimiter = ',')]
    pub served_model_name: Vec<String>,
    /// File with one API key a line that guards /v1, with `weight=N` after one that gets a larger share; a word that
    /// starts with # starts a comment [default: no key is needed]
    #[arg(long, env = "GLMSERVE_API_KEY_FILE", value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Origins whose web pages may use the server: `https://HOST[:PORT]`, `localhost` for all of this machine,
    /// `*` for all of the web; `null` and those of apps (`tauri://localhost`) only as they are
    #[arg(long, env = "GLMSERVE_ALLOWED_ORIGINS", value_name = "ORIGIN,..", default_value = "localhost", value_parser = str::parse::<AllowedOrigins>)]
    pub allowed_origins: AllowedOrigins,
    /// Who is computed when.
    #[command(flatten)]
    pub scheduling: SchedulingArgs,
    /// Largest request body, in bytes
    #[arg(long, env = "GLMSERVE_MAX_BODY_BYTES", value_name = "BYTES", default_value_t = 8 * MIB, value_parser = up_to::<{ 1 << 30 }>)]
    pub max_body_bytes: usize,
    /// How many connections there may be.
    #[command(flatten)]
    pub connections: ConnectionArgs,
    /// Largest reply, in bytes of text
    #[arg(long, env = "GLMSERVE_MAX_REPLY_BYTES", value_name = "BYTES", default_value_t = 8 * MIB, value_parser = up_to::<{ 1 << 30 }>)]
    pub max_reply_bytes: usize,
    /// Silence after which a stream sends a comment, in seconds
    #[arg(long, env = "GLMSERVE_KEEP_ALIVE_COMMENT", value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub keep_alive_comment: u64,
    /// What replies may take, and what is kept of them.
    #[command(flatten)]
    pub streams: StreamArgs,
    /// How long running streams may go on, and clients may read what is left of them, after SIGTERM, in seconds
    #[arg(long, env = "GLMSERVE_DRAIN_TIMEOUT", value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub drain_timeout: u64,
    /// How long the engine may fail to give its known answer after a fault, in seconds, before the process
    /// ends with exit code 70, so that whoever supervises it starts a new one; 0 is for ever. A device that is
    /// lost for good ends it at once
    #[arg(long, env = "GLMSERVE_FAULT_EXIT_TIMEOUT", value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub fault_exit_timeout: u64,
    /// Form of the log on standard error. RUST_LOG chooses what is logged, for example `info,ort=warn`
    #[arg(long, env = "GLMSERVE_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// Options of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Folder that glm-export wrote
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// What computes.
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Options of `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Folder that glm-export wrote
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Memory of the GPU, in MiB, for a graph of the CUDA provider
    #[arg(long, value_name = "MIB", value_parser = up_to::<{ 1 << 24 }>)]
    pub gpu_memory: Option<usize>,
    /// Part of the GPU's memory that may be taken [default: 0.9]
    #[arg(long, env = "GLMSERVE_GPU_MEMORY_UTILIZATION", value_name = "PART", value_parser = part)]
    pub gpu_memory_utilization: Option<f64>,
    /// Memory of the KV cache, in MiB [default: 1024; for a graph of the CUDA provider what is left of the GPU's]
    #[arg(long, env = "GLMSERVE_KV_CACHE_MEMORY", value_name = "MIB", value_parser = up_to::<{ 1 << 24 }>)]
    pub kv_cache_memory: Option<usize>,
    /// How large steps may be.
    #[command(flatten)]
    pub steps: StepArgs,
    /// Lengths of sequences to tell the number of, in tokens [default: 512, 2048, 8192, 32768 and the model's longest]
    #[arg(long, value_name = "TOKENS,..", value_delimiter = ',', value_parser = up_to::<{ 1 << 24 }>)]
    pub context: Vec<usize>,
}

impl PlanArgs {
    /// Memory of the KV cache of a graph of the CPU provider, in MiB, where nothing else is said.
    pub fn default_kv_cache_memory(&self) -> usize {
        DEFAULT_KV_CACHE_MEMORY
    }

    /// Part of the GPU's memory that may be taken.
    pub fn utilization(&self) -> f64 {
        self.gpu_memory_utilization.unwrap_or(DEFAULT_GPU_MEMORY_UTILIZATION)
    }
}

/// Options of `logits`.
#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// The model and how to run it.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Token ids of the sequence
    #[arg(long, value_name = "ID,..", value_delimiter = ',', required = true)]
    pub ids: Vec<u32>,
    /// Tokens a step; 1 is what decoding runs [default: all]
    #[arg(long, value_name = "N", value_parser = up_to::<{ 1 << 24 }>)]
    pub chunk: Option<usize>,
    /// Where to write float32 [number of ids, padded vocabulary]
    #[arg(long, value_name = "FILE.npy")]
    pub out: PathBuf,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Memory of the KV cache, in MiB, where nothing else is said.
const DEFAULT_KV_CACHE_MEMORY: usize = 1024;
/// Part of a GPU's memory that is taken where nothing else is said.
const DEFAULT_GPU_MEMORY_UTILIZATION: f64 = 0.9;

impl ModelArgs {
    /// Bytes of the KV cache, which is in the provider's memory. Warns if they do not fit at the moment.
    ///
    /// # Errors
    /// [`LoadError::Config`]: together with the weights, more than this process may take, where it would be granted
    /// now and missed later, or than the GPU may give.
    pub fn kv_cache_bytes(&self, manifest: &Manifest) -> Result<usize, LoadError> {
        let mib = self.kv_cache_memory.unwrap_or(DEFAULT_KV_CACHE_MEMORY);
        let num_bytes = mib * MIB;
        if manifest.graph.provider == Provider::Cuda {
            return match self.runtime.gpu_memory {
                Some(limit) if mib >= limit => Err(LoadError::Config(format!(
                    "--kv-cache-memory {mib} MiB leaves nothing of --gpu-memory {limit} MiB for the weights"
                ))),
                _ => Ok(num_bytes),
            };
        }
        let weights = manifest.files.values().map(|file| file.bytes).sum();
        let need = MemoryNeed { weights, kv_cache: num_bytes as u64 };
        if let Some(warning) = need.check(Path::new("/")).map_err(LoadError::Config)? {
            tracing::warn!("{warning}");
        }
        Ok(num_bytes)
    }
}

impl ServeArgs {
    /// How to run the graph in steps of this size.
    ///
    /// # Errors
    /// As [`ModelArgs::kv_cache_bytes`]; both ways to size the cache were given; an option is not for this graph.
    pub fn ort_options(&self, manifest: &Manifest, config: &EngineConfig) -> Result<OrtOptions, LoadError> {
        let is_cuda = manifest.graph.provider == Provider::Cuda;
        let kv_cache = match (self.model.kv_cache_memory, self.gpu_memory_utilization) {
            (Some(_), Some(_)) => {
                let message =
                    "--kv-cache-memory and --gpu-memory-utilization both size the KV cache: choose one";
                return Err(LoadError::Config(message.into()));
            }
            (None, Some(part)) => KvCacheMemory::Utilization(part),
            (None, None) if is_cuda => KvCacheMemory::Utilization(DEFAULT_GPU_MEMORY_UTILIZATION),
            _ => KvCacheMemory::Bytes(self.model.kv_cache_bytes(manifest)?),
        };
        let EngineConfig { max_num_seqs, max_num_batched_tokens, .. } = *config;
        let options = self.model.runtime.options(0);
        let options = OrtOptions { kv_cache, max_num_seqs, max_num_batched_tokens, ..options };
        options.check(&manifest.graph)?;
        Ok(options)
    }
}

impl RuntimeArgs {
    /// How to run a graph with this much memory for keys and values, one sequence at a time.
    pub fn options(&self, kv_cache_bytes: usize) -> OrtOptions {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        OrtOptions {
            device_id: self.device,
            device_memory_bytes: self.gpu_memory.map(|mib| mib << 20),
            enforce_eager: self.enforce_eager,
            bit_exact: self.bit_exact,
            ..OrtOptions::new(self.onnxruntime.clone(), self.threads.unwrap_or_else(all), kv_cache_bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(arguments: &[&str]) -> Result<ServeArgs, String> {
        let arguments = ["glmserve", "serve", "--model", "m"].iter().chain(arguments);
        match Cli::try_parse_from(arguments).map_err(|error| error.to_string())?.command {
            Command::Serve(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_port_from_kubernetes_is_explained() {
        let error = serve(&["--port", "tcp://10.0.0.1:80"]).unwrap_err();
        assert!(error.contains("enableServiceLinks"), "{error}");
        assert_eq!(serve(&["--port", "80"]).unwrap().port, 80);
    }

    #[test]
    fn origins_are_checked_at_the_start() {
        assert_eq!(serve(&[]).unwrap().allowed_origins, AllowedOrigins::default());
        let args = serve(&["--allowed-origins", "https://chat.example, tauri://localhost"]).unwrap();
        assert_eq!(args.allowed_origins, "https://chat.example,tauri://localhost".parse().unwrap());
        let error = serve(&["--allowed-origins", "chat.example"]).unwrap_err();
        assert!(error.contains("--allowed-origins") && error.contains("has no scheme"), "{error}");
    }

    #[test]
    fn names_are_split_at_commas_and_zero_is_refused() {
        let args = serve(&["--served-model-name", "a,b", "--served-model-name", "c"]).unwrap();
        assert_eq!(args.served_model_name, ["a", "b", "c"]);
        assert!(serve(&["--max-num-seqs", "0"]).unwrap_err().contains("from 1 to"));
    }
}
