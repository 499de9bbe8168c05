//! Owns the options of a bench.

use std::path::PathBuf;

/// Measures a server with streams that each send their next request when the last one ended, or with requests
/// that arrive at random.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// The server's address, without /v1
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    pub base_url: String,
    /// The model to ask for [default: the first that the server lists]
    #[arg(long)]
    pub model: Option<String>,
    /// Sent as a bearer token
    #[arg(long, value_name = "KEY", env = "GLMSERVE_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Numbers of streams, one run for each
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,4,16",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub streams: Vec<u32>,
    /// In place of streams: requests a second that arrive by a Poisson process, one run for each
    #[arg(long, value_name = "R,..", value_delimiter = ',', conflicts_with_all = ["streams", "requests_per_stream"],
          value_parser = parse_rate)]
    pub rates: Vec<f64>,
    /// Measured arrivals of each rate, after an eighth as many to warm up
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub arrivals: u32,
    /// Measured requests of each stream, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub requests_per_stream: u32,
    /// Prompt length; several are taken in turn
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "128",
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub prompt_tokens: Vec<u32>,
    /// Tokens to generate for each request; several are taken in turn
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "64",
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_tokens: Vec<u32>,
    /// Seed of the prompts [default: a fresh one, so that no prefix cache helps]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Where the server's metrics are [default: BASE_URL/metrics, if there are any]
    #[arg(long, value_name = "URL")]
    pub metrics_url: Option<String>,
    /// Process to read the server's memory from, if its metrics do not tell
    #[arg(long)]
    pub pid: Option<u32>,
    /// Longest silence of a stream before it counts as failed
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub idle_timeout_s: u64,
    /// Resume broken streams and check their hashes [default: measure each stream as it comes]
    #[arg(long)]
    pub resume: bool,
    /// Also write the report as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Reads a rate: a run at a lower one would never end.
fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (0.001..=10_000.0).contains(&rate) => Ok(rate),
        _ => Err("not between 0.001 and 10000".to_owned()),
    }
}
