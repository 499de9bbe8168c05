//! Owns the options that say who is computed when, and what of it is used again.

use std::time::Duration;

use clap::Args;
use glm_engine::model::manifest::Provider;
use glm_engine::{EngineConfig, LoadError, Manifest, PrefixCaching};

use super::values::up_to;
use crate::api_keys::ApiKeys;

/// How large steps may be.
#[derive(Debug, Args)]
pub struct StepArgs {
    /// Most sequences in one step [default: 64; 256 for a graph of the CUDA provider]
    #[arg(long, env = "GLMSERVE_MAX_NUM_SEQS", value_name = "N", value_parser = up_to::<4096>)]
    pub max_num_seqs: Option<usize>,
    /// Most tokens in one step: running replies first, the rest for prompts [default: 512; 640 for a graph of the CUDA
    /// provider; --max-num-seqs if that is more]
    #[arg(long, env = "GLMSERVE_MAX_NUM_BATCHED_TOKENS", value_name = "N", value_parser = up_to::<{ 1 << 20 }>)]
    pub max_num_batched_tokens: Option<usize>,
}

impl StepArgs {
    /// Most sequences and most tokens of a step.
    ///
    /// # Errors
    /// [`LoadError::Config`]: fewer tokens than sequences.
    pub fn largest_step(&self, manifest: &Manifest) -> Result<(usize, usize), LoadError> {
        let (default_seqs, default_tokens) = default_step(manifest.graph.provider);
        let max_num_seqs = self.max_num_seqs.unwrap_or(default_seqs);
        let max_num_batched_tokens = self.max_num_batched_tokens.unwrap_or(default_tokens.max(max_num_seqs));
        if max_num_seqs > max_num_batched_tokens {
            return Err(LoadError::Config(format!(
                "--max-num-seqs {max_num_seqs} is more than --max-num-batched-tokens {max_num_batched_tokens}: each \
                 sequence needs a token a step"
            )));
        }
        Ok((max_num_seqs, max_num_batched_tokens))
    }
}

/// Who is computed when.
#[derive(Debug, Args)]
pub struct SchedulingArgs {
    /// How large steps may be.
    #[command(flatten)]
    pub steps: StepArgs,
    /// Most draft tokens that are looked up in a sequence's own text and checked in one step, where that pays; 0
    /// turns it off. It changes no reply of the CPU provider with the engine's own kernels. Steps that check draft
    /// tokens are not among the captured CUDA graphs [default: 8 for a graph of the CPU provider, 0 for one of
    /// CUDA's]
    #[arg(long, env = "GLMSERVE_SPECULATIVE_TOKENS", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=64))]
    pub speculative_tokens: Option<u32>,
    /// Most requests that wait; one more is answered with 429
    #[arg(long, env = "GLMSERVE_MAX_NUM_WAITING", value_name = "N", default_value_t = EngineConfig::default().max_num_waiting as u32, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub max_num_waiting: u32,
    /// Most requests of one API key that run or wait [default: half of --max-num-seqs + --max-num-waiting if there are several keys]
    #[arg(long, env = "GLMSERVE_MAX_NUM_REQUESTS_PER_KEY", value_name = "N", value_parser = up_to::<{ 1 << 20 }>)]
    pub max_num_requests_per_key: Option<usize>,
    /// Longest sequence, prompt and reply, in tokens [default: what the model was made for]
    #[arg(long, env = "GLMSERVE_MAX_MODEL_LEN", value_name = "TOKENS", value_parser = up_to::<{ 1 << 24 }>)]
    pub max_model_len: Option<usize>,
    /// Longest pause that prompts may put into running replies, in milliseconds; a block is always taken
    #[arg(long, env = "GLMSERVE_TARGET_INTER_TOKEN_LATENCY", value_name = "MS", default_value_t = EngineConfig::default().target_inter_token_latency.as_millis() as u64, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub target_inter_token_latency: u64,
    /// Take no notice of the field `priority` of requests
    #[arg(long, env = "GLMSERVE_IGNORE_PRIORITY")]
    pub ignore_priority: bool,
    /// Compute every prompt from its first token, although another one started alike
    #[arg(long, env = "GLMSERVE_NO_PREFIX_CACHE")]
    pub no_prefix_cache: bool,
    // Who measures time to first token can find out whether somebody else sent the same start.
    /// Use again only what was computed for the same API key
    #[arg(long, env = "GLMSERVE_PREFIX_CACHE_SALT_PER_KEY", conflicts_with = "no_prefix_cache")]
    pub prefix_cache_salt_per_key: bool,
}

impl SchedulingArgs {
    /// The engine's limits for this model and these keys.
    ///
    /// # Errors
    /// [`LoadError::Config`]: longer than the model's rotary tables, or fewer tokens than sequences.
    pub fn engine_config(
        &self,
        manifest: &Manifest,
        keys: Option<&ApiKeys>,
    ) -> Result<EngineConfig, LoadError> {
        let longest = manifest.geometry.max_model_len;
        let max_model_len = self.max_model_len.unwrap_or(longest);
        let (max_num_seqs, max_num_batched_tokens) = self.steps.largest_step(manifest)?;
        if max_model_len > longest {
            let message =
                format!("--max-model-len {max_model_len} is more than the model's {longest} tokens");
            return Err(LoadError::Config(message));
        }
        let default = EngineConfig::default();
        let tenant_weights = keys.map_or(default.tenant_weights, ApiKeys::weights);
        let max_num_requests = max_num_seqs + self.max_num_waiting as usize;
        let most_of_one = match tenant_weights.len() {
            1 => max_num_requests,
            _ => max_num_requests.div_ceil(2),
        };
        let target_inter_token_latency = Duration::from_millis(self.target_inter_token_latency);
        Ok(EngineConfig {
            max_num_seqs,
            max_num_batched_tokens,
            max_num_waiting: self.max_num_waiting as usize,
            max_num_draft_tokens: self.max_num_draft_tokens(manifest.graph.provider),
            max_model_len,
            tenant_weights,
            max_num_requests_per_tenant: self.max_num_requests_per_key.unwrap_or(most_of_one),
            honours_priority: !self.ignore_priority,
            target_inter_token_latency,
            // A longer target is meant to be used.
            max_step_time: default.max_step_time.max(target_inter_token_latency),
            prefix_caching: match (self.no_prefix_cache, self.prefix_cache_salt_per_key) {
                (true, _) => PrefixCaching::Off,
                (_, true) => PrefixCaching::PerTenant,
                _ => PrefixCaching::Shared,
            },
            ..EngineConfig::default()
        })
    }

    /// As asked for; else none on CUDA, where a step that checks draft tokens leaves the captured graphs, and where a
    /// row's bits depend on the rows beside it.
    fn max_num_draft_tokens(&self, provider: Provider) -> usize {
        match (self.speculative_tokens, provider) {
            (Some(most), _) => most as usize,
            (None, Provider::Cpu) => EngineConfig::default().max_num_draft_tokens,
            (None, Provider::Cuda) => 0,
        }
    }
}

/// Sequences and tokens of a step. A GPU's step takes hardly longer for more sequences, and should hold a usual prompt
/// of 500 tokens whole beside them.
fn default_step(provider: Provider) -> (usize, usize) {
    let default = EngineConfig::default();
    match provider {
        Provider::Cpu => (default.max_num_seqs, default.max_num_batched_tokens),
        Provider::Cuda => (256, 640),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        args: SchedulingArgs,
    }

    fn config(arguments: &[&str], keys: Option<&ApiKeys>) -> Result<EngineConfig, String> {
        let arguments = ["program"].iter().chain(arguments);
        let program = Program::try_parse_from(arguments).map_err(|error| error.to_string())?;
        let manifest = crate::fixtures::chatglm3().manifest();
        program.args.engine_config(&manifest, keys).map_err(|error| error.to_string())
    }

    #[test]
    fn the_prefix_cache_is_on_unless_told_otherwise() {
        let caching = |arguments: &[&str]| config(arguments, None).map(|config| config.prefix_caching);
        assert_eq!(caching(&[]), Ok(PrefixCaching::Shared));
        assert_eq!(caching(&["--prefix-cache-salt-per-key"]), Ok(PrefixCaching::PerTenant));
        assert_eq!(caching(&["--no-prefix-cache"]), Ok(PrefixCaching::Off));
        assert!(caching(&["--no-prefix-cache", "--prefix-cache-salt-per-key"]).is_err());
    }

    #[test]
    fn keys_are_tenants_and_one_of_several_gets_half_of_the_places() {
        let places = ["--max-num-seqs", "2", "--max-num-waiting", "5"];
        let alone = config(&places, None).unwrap();
        assert_eq!((alone.tenant_weights, alone.max_num_requests_per_tenant), (vec![1], 7));
        let keys = ApiKeys::parse(b"a\nb weight=3\n").unwrap();
        let several = config(&places, Some(&keys)).unwrap();
        assert_eq!((several.tenant_weights, several.max_num_requests_per_tenant), (vec![1, 3], 4));
    }

    #[test]
    fn guesses_can_be_turned_off_and_are_bounded() {
        let most = |number: &str| {
            config(&["--speculative-tokens", number], None).map(|config| config.max_num_draft_tokens)
        };
        assert_eq!((most("0"), most("64")), (Ok(0), Ok(64)));
        assert!(most("65").unwrap_err().contains("--speculative-tokens"));
    }

    #[test]
    fn guesses_are_made_by_default_on_the_cpu_only() {
        let most = |arguments: &[&str], provider| {
            let program = Program::try_parse_from(["program"].iter().chain(arguments)).unwrap();
            program.args.max_num_draft_tokens(provider)
        };
        let default = EngineConfig::default().max_num_draft_tokens;
        assert_eq!((most(&[], Provider::Cpu), most(&[], Provider::Cuda)), (default, 0));
        assert_eq!(most(&["--speculative-tokens", "3"], Provider::Cuda), 3);
    }

    #[test]
    fn limits_that_contradict_each_other_are_named() {
        let error = config(&["--max-num-seqs", "9", "--max-num-batched-tokens", "8"], None).unwrap_err();
        assert!(error.contains("--max-num-seqs 9"), "{error}");
        assert!(config(&["--max-model-len", "1000000"], None).unwrap_err().contains("--max-model-len"));
    }
}
