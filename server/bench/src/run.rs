//! Owns the run of a bench: what is asked, of whom, and when.
//!
//! Invariant: the first request of each stream (of arrivals, the first ninth) warms up and is not counted, and
//! every request after it is, however it ends.

use std::sync::Arc;
use std::time::Duration;

use glmserve_client::{Client, ClientConfig, clock};
use tokio::task::JoinSet;

use crate::args::BenchArgs;
use crate::error::BenchError;
use crate::load::{Load, WARM_UP_SHARE};
use crate::report::{BenchReport, RunReport};
use crate::sample::{Outcome, Sample, Samples};
use crate::server_side::{self, Counters};
use crate::workload::{TokenRate, Workload};

/// Runs the bench; says on standard error how far it is.
///
/// The caller prints the report and exits with a failure unless [`BenchReport::is_clean`].
pub async fn run(args: BenchArgs) -> Result<BenchReport, BenchError> {
    check(&args)?;
    let mut config = ClientConfig::new(&args.base_url);
    config.api_key.clone_from(&args.api_key);
    config.idle_timeout = Duration::from_secs(args.idle_timeout_s);
    let client = Client::new(config).map_err(BenchError::Client)?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => first_model(&client).await?,
    };
    let seed = args.seed.unwrap_or_else(clock::fresh_seed);
    let workload = Workload { model, seed };
    let rate = measure_token_rate(&client, &workload).await?;
    let num_words = words_of(&args, rate);
    let bench =
        Bench { client, workload, num_words, max_tokens: args.max_tokens.clone(), resume: args.resume };
    let bench = Arc::new(bench);
    let mut num_sent = u64::from(TokenRate::PROBE_WORDS.len() as u32);
    let mut runs = Vec::new();
    for load in Load::of(&args) {
        let before = read_counters(&bench.client, &args).await?;
        let samples = bench.run(load, num_sent).await;
        num_sent += samples.num_all();
        let mut run = RunReport::new(load, &samples);
        let after = read_counters(&bench.client, &args).await?;
        run.tokens_per_step = after.tokens_per_step(&before);
        run.step_ms = after.step_ms(&before);
        let resident_bytes = after.resident_bytes.or_else(|| server_side::resident_bytes(args.pid?));
        run.resident_mib = resident_bytes.map(|bytes| bytes / f64::from(1 << 20));
        eprintln!("{load}: {:.1} output tok/s in {:.1} s", run.output_tokens_per_s, run.wall_s);
        runs.push(run);
    }
    let report = BenchReport {
        base_url: args.base_url,
        model: bench.workload.model.clone(),
        seed,
        prompt_tokens: args.prompt_tokens,
        max_tokens: args.max_tokens,
        runs,
    };
    if let Some(path) = args.json {
        let text = serde_json::to_string_pretty(&report).map_err(std::io::Error::other);
        let written = text.and_then(|text| std::fs::write(&path, text + "\n"));
        written.map_err(|error| BenchError::Json { path, error })?;
    }
    Ok(report)
}

/// What would otherwise be found out after minutes of measuring.
fn check(args: &BenchArgs) -> Result<(), BenchError> {
    if let Some(pid) = args.pid.filter(|pid| server_side::resident_bytes(*pid).is_none()) {
        return Err(BenchError::Pid(pid));
    }
    if let Some(path) = &args.json {
        let opened = std::fs::OpenOptions::new().create(true).append(true).open(path);
        opened.map_err(|error| BenchError::Json { path: path.clone(), error })?;
    }
    Ok(())
}

async fn first_model(client: &Client) -> Result<String, BenchError> {
    let models = client.models().await.map_err(BenchError::Models)?;
    models.into_iter().next().ok_or(BenchError::NoModel)
}

/// Two small requests tell how many tokens a word comes to, and that the server works at all.
async fn measure_token_rate(client: &Client, workload: &Workload) -> Result<TokenRate, BenchError> {
    let mut num_tokens = [0; TokenRate::PROBE_WORDS.len()];
    for (index, num_words) in TokenRate::PROBE_WORDS.into_iter().enumerate() {
        let sample = Sample::take(client, &workload.request(index as u64, num_words, 1), false).await;
        // One token may well be without text, so an empty stream is no failure here.
        if !matches!(sample.outcome, Outcome::Ok | Outcome::Empty) {
            return Err(BenchError::FirstRequest(sample.error.unwrap_or_default()));
        }
        num_tokens[index] = sample.usage.map_or(0, |usage| usage.prompt_tokens);
    }
    Ok(TokenRate::from_probes(num_tokens))
}

fn words_of(args: &BenchArgs, rate: TokenRate) -> Vec<u32> {
    args.prompt_tokens.iter().map(|&prompt_tokens| rate.num_words(prompt_tokens)).collect()
}

/// Metrics that were asked for must be there; those at the default address need not.
async fn read_counters(client: &Client, args: &BenchArgs) -> Result<Counters, BenchError> {
    match &args.metrics_url {
        Some(url) => client.get(url).await.map(|text| Counters::parse(&text)).map_err(BenchError::Metrics),
        None => {
            let text = client.get(&client.url("/metrics")).await.unwrap_or_default();
            Ok(Counters::parse(&text))
        }
    }
}

/// What every run of a bench shares.
struct Bench {
    client: Client,
    workload: Workload,
    num_words: Vec<u32>,
    max_tokens: Vec<u32>,
    resume: bool,
}

impl Bench {
    /// Runs one load; its prompts are those from `first_index` on.
    async fn run(self: &Arc<Self>, load: Load, first_index: u64) -> Samples {
        match load {
            Load::Closed { streams, requests_per_stream } => {
                self.run_streams(streams, requests_per_stream, first_index).await
            }
            Load::Open { rate, arrivals } => self.run_arrivals(rate, arrivals, first_index).await,
        }
    }

    /// No stream waits for another, so that after the first requests prompts and replies are mixed.
    async fn run_streams(
        self: &Arc<Self>,
        num_streams: u32,
        requests_per_stream: u32,
        first_index: u64,
    ) -> Samples {
        let mut streams = JoinSet::new();
        for stream in 0..num_streams {
            let bench = Arc::clone(self);
            streams.spawn(async move {
                let mut samples = Vec::new();
                for round in 0..=requests_per_stream {
                    let index = first_index + u64::from(round) * u64::from(num_streams) + u64::from(stream);
                    // Shifted by the stream, so that the lengths are mixed at any moment too.
                    samples.push(bench.sample(index, (stream + round) as usize).await);
                }
                samples
            });
        }
        let mut samples = Samples::default();
        for mut stream in streams.join_all().await {
            samples.rest.extend(stream.split_off(1));
            samples.first.extend(stream);
        }
        samples
    }

    /// A slow server is not waited for: arrivals come at their times.
    async fn run_arrivals(self: &Arc<Self>, rate: f64, num_arrivals: u32, first_index: u64) -> Samples {
        let num_first = num_arrivals.div_ceil(WARM_UP_SHARE);
        let mut requests = JoinSet::new();
        let mut at = clock::now();
        for number in 0..num_first + num_arrivals {
            let bench = Arc::clone(self);
            let index = first_index + u64::from(number);
            requests.spawn(async move { (number, bench.sample(index, number as usize).await) });
            at += self.workload.gap(index, rate);
            tokio::time::sleep(at.saturating_duration_since(clock::now())).await;
        }
        let mut samples = Samples::default();
        for (number, sample) in requests.join_all().await {
            let part = if number < num_first { &mut samples.first } else { &mut samples.rest };
            part.push(sample);
        }
        samples
    }

    /// One request; `turn` picks its lengths.
    async fn sample(&self, index: u64, turn: usize) -> Sample {
        let num_words = self.num_words[turn % self.num_words.len()];
        let max_tokens = self.max_tokens[turn % self.max_tokens.len()];
        let request = self.workload.request(index, num_words, max_tokens);
        Sample::take(&self.client, &request, self.resume).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use glmserve_client::testing::{CannedServer, Reply};
    use std::sync::atomic::{AtomicU32, Ordering};

    const GOOD: &str = concat!(
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"b\"},\"finish_reason\":\"length\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":20,\"completion_tokens\":2}}\n\n",
        "data: [DONE]\n\n",
    );

    fn args(server: &CannedServer, more: &[&str]) -> BenchArgs {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            bench: BenchArgs,
        }
        let mut words = vec!["bench", "--base-url", &server.base_url, "--seed", "5"];
        if !more.contains(&"--max-tokens") {
            words.extend(["--max-tokens", "2"]);
        }
        let cli: Cli = clap::Parser::try_parse_from(words.iter().chain(more)).expect("good arguments");
        cli.bench
    }

    /// Answers chats with what `chat` makes of their number, and counts a step and two tokens for each.
    async fn server(chat: impl Fn(u32) -> Reply + Send + Sync + 'static) -> CannedServer {
        let num_chats = AtomicU32::new(0);
        CannedServer::start(move |head, _| match head.split(' ').nth(1) {
            Some("/v1/models") => Reply::status("200 OK").part(br#"{"data":[{"id":"m"}]}"#),
            Some("/metrics") => {
                let steps = num_chats.load(Ordering::Relaxed);
                let text = format!(
                    "glmserve_engine_steps_total {steps}\nglmserve_generation_tokens_total {}\n",
                    steps * 2
                );
                Reply::status("200 OK").part(text.as_bytes())
            }
            _ => chat(num_chats.fetch_add(1, Ordering::Relaxed)),
        })
        .await
    }

    #[tokio::test]
    async fn whole_streams_make_a_clean_report_in_both_forms() {
        let server = server(|_| Reply::sse().part(GOOD.as_bytes())).await;
        let json = std::env::temp_dir().join(format!("glmserve-bench-{}.json", std::process::id()));
        let path = json.to_str().expect("a plain path");
        let pid = std::process::id().to_string();
        let report =
            run(args(&server, &["--streams", "1,3", "--json", path, "--pid", &pid])).await.expect("a report");
        let written = std::fs::read_to_string(&json).expect("the report was written");
        std::fs::remove_file(&json).expect("it was there");
        assert_eq!(written, serde_json::to_string_pretty(&report).expect("JSON") + "\n");
        assert!(report.is_clean());
        assert_eq!(report.model, "m");
        let counts: Vec<(u32, u64, u64)> = report
            .runs
            .iter()
            .map(|run| (run.streams.unwrap_or(0), run.num_ok, run.completion_tokens))
            .collect();
        assert_eq!(counts, [(1, 4, 8), (3, 12, 24)]);
        assert_eq!(report.runs[1].tokens_per_step, Some(2.0));
        assert!(report.runs[1].resident_mib.expect("this process has memory") > 1.0);
        let table = report.to_string();
        println!("{table}");
        let row = |name: &str| table.lines().find(|line| line.starts_with(name)).expect("the row");
        assert_eq!(row("ok").split_whitespace().collect::<Vec<_>>(), ["ok", "4", "12"]);
        let width = row("load").len();
        assert_eq!(row("server RSS MiB").len(), width, "the columns are aligned");
    }

    #[tokio::test]
    async fn each_way_to_break_is_counted_and_the_report_is_not_clean() {
        // Two probes and one warm-up come first.
        let server = server(|number| match number {
            3 => Reply::sse().part(&GOOD.as_bytes()[..100]),
            4 => Reply::sse().part(b"data: [DONE]\n\n"),
            5 => Reply::sse().part(b"data: {\"error\":{\"message\":\"lost\"}}\n\ndata: [DONE]\n\n"),
            6 => Reply::status("503 Service Unavailable").part(b"{\"error\":{\"message\":\"full\"}}"),
            _ => Reply::sse().part(GOOD.as_bytes()),
        })
        .await;
        let report =
            run(args(&server, &["--streams", "1", "--requests-per-stream", "5"])).await.expect("a report");
        let run = &report.runs[0];
        assert_eq!((run.num_ok, run.num_truncated, run.num_empty, run.num_failed), (1, 1, 1, 2));
        assert_eq!(run.errors, ["the stream ended without [DONE]", "lost", "HTTP 503: full"]);
        assert!(!report.is_clean());
        assert!(report.to_string().contains("1 str.: HTTP 503: full"));
    }

    #[tokio::test]
    async fn arrivals_do_not_wait_for_answers_and_their_lengths_take_turns() {
        let bodies = Arc::new(std::sync::Mutex::new(Vec::new()));
        let seen = Arc::clone(&bodies);
        let server = CannedServer::start(move |head, body| match head.split(' ').nth(1) {
            Some("/v1/chat/completions") => {
                let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
                seen.lock().expect("no test panicked").push(body["max_tokens"].clone());
                Reply::sse().part(GOOD.as_bytes())
            }
            _ => Reply::status("200 OK").part(br#"{"data":[{"id":"m"}]}"#),
        })
        .await;
        let more = ["--rates", "500", "--arrivals", "9", "--max-tokens", "2,3"];
        let report = run(args(&server, &more)).await.expect("a report");
        let run = &report.runs[0];
        assert_eq!((run.rate, run.streams, run.num_requests, run.num_ok), (Some(500.0), None, 9, 9));
        assert_eq!(run.num_short, 4, "each reply has two tokens");
        let mut lengths: Vec<i64> =
            bodies.lock().expect("no test panicked").iter().filter_map(serde_json::Value::as_i64).collect();
        lengths.sort_unstable();
        // Two probes of one token each; two arrivals that warm up and nine that count.
        assert_eq!(lengths, [1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]);
    }

    #[tokio::test]
    async fn a_server_that_cannot_be_measured_is_an_error() {
        let failing = server(|_| Reply::status("500 Oops").part(b"broken")).await;
        let error = run(args(&failing, &[])).await.expect_err("the first request failed");
        assert_eq!(error.to_string(), "the first request failed: HTTP 500: broken");
        let good = server(|_| Reply::sse().part(GOOD.as_bytes())).await;
        let error = run(args(&good, &["--metrics-url", "http://127.0.0.1:1/metrics"])).await;
        assert!(matches!(error, Err(BenchError::Metrics(_))), "{error:?}");
    }
}
