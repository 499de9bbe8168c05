//! Owns what a bench says: the figures, as JSON and as a table.
//!
//! Invariant: times and rates come from whole streams only, and the count of the others stands beside them.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::load::Load;
use crate::sample::{Outcome, Sample, Samples};

/// How many different errors are kept in words.
const MAX_ERRORS: usize = 5;

/// All figures of a bench.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BenchReport {
    /// The server's address.
    pub base_url: String,
    /// The model that was asked for.
    pub model: String,
    /// The seed of the prompts: the same seed makes the same prompts.
    pub seed: u64,
    /// The prompt lengths that were asked for, in turn.
    pub prompt_tokens: Vec<u32>,
    /// The tokens asked of each request, in turn.
    pub max_tokens: Vec<u32>,
    /// One run for each number of streams, or each rate.
    pub runs: Vec<RunReport>,
}

/// The figures at one number of streams, or one rate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunReport {
    /// Streams kept open at a time, in a closed loop.
    pub streams: Option<u32>,
    /// Arrivals a second, in an open loop.
    pub rate: Option<f64>,
    /// Requests that count, the warm-up not among them.
    pub num_requests: u64,
    /// Requests that ended whole.
    pub num_ok: u64,
    /// Requests refused, or broken before the stream began, or with an error told in it.
    pub num_failed: u64,
    /// Streams that ended without `[DONE]`.
    pub num_truncated: u64,
    /// Streams that ended whole and brought no content.
    pub num_empty: u64,
    /// Broken connections after which a stream went on.
    pub num_resumes: u64,
    /// Whole streams without token counts: their tokens are missing from the rates.
    pub num_without_usage: u64,
    /// Whole streams with fewer tokens than asked: the server did not honour `ignore_eos`.
    pub num_short: u64,
    /// The first errors, in words.
    pub errors: Vec<String>,
    /// The window of the rates: from the end of the last request that warmed up to the end of the last.
    pub wall_s: f64,
    /// The mean prompt length, as the server counted it.
    pub prompt_tokens_mean: f64,
    /// Prompt tokens that came from a prefix cache, as the server counted them.
    pub cached_tokens: u64,
    /// Tokens generated, as the server counted them.
    pub completion_tokens: u64,
    /// Those generated in the window, over its length.
    pub output_tokens_per_s: f64,
    /// The same with prompt tokens, each prompt's counted at its first content.
    pub total_tokens_per_s: f64,
    /// Whole streams that ended in the window, over its length.
    pub requests_per_s: f64,
    /// Time to the first content.
    pub ttft_ms: Option<Spread>,
    /// Time between content events, all streams together.
    pub itl_ms: Option<Spread>,
    /// Each stream's mean time per token after the first.
    pub tpot_ms: Option<Spread>,
    /// Time to the end of the stream.
    pub latency_ms: Option<Spread>,
    /// Tokens generated per engine step, from the server's counters.
    pub tokens_per_step: Option<f64>,
    /// Mean time of an engine step, from the server's counters.
    pub step_ms: Option<f64>,
    /// The server's memory after the run.
    pub resident_mib: Option<f64>,
}

/// How a set of times is spread, in milliseconds; percentiles are by nearest rank, so each is a real sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Spread {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Spread {
    fn of(times: impl Iterator<Item = Duration>) -> Option<Self> {
        let mut times: Vec<Duration> = times.collect();
        times.sort_unstable();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let rank = |percent: usize| ms(times[(times.len() * percent).div_ceil(100).max(1) - 1]);
        let max = ms(*times.last()?);
        let mean = ms(times.iter().sum()) / times.len() as f64;
        Some(Self { mean, p50: rank(50), p90: rank(90), p99: rank(99), max })
    }
}

impl RunReport {
    pub(super) fn new(load: Load, Samples { first, rest: samples }: &Samples) -> Self {
        let (streams, rate) = match load {
            Load::Closed { streams, .. } => (Some(streams), None),
            Load::Open { rate, .. } => (None, Some(rate)),
        };
        // Without the time in which part of the streams had not begun or were all in step.
        let begin = first.iter().map(Sample::ended).max();
        let end = samples.iter().map(Sample::ended).max();
        let wall_s = begin.zip(end).map_or(0.0, |(begin, end)| (end - begin).as_secs_f64());
        let count = |outcome| samples.iter().filter(|sample| sample.outcome == outcome).count() as u64;
        let whole: Vec<&Sample> = samples.iter().filter(|sample| sample.outcome == Outcome::Ok).collect();
        let usages: Vec<_> = whole.iter().filter_map(|sample| sample.usage).collect();
        let completion_tokens = usages.iter().map(|usage| usage.completion_tokens).sum();
        let prompt_tokens: u64 = usages.iter().map(|usage| usage.prompt_tokens).sum();
        let mut errors: Vec<String> = Vec::new();
        for error in samples.iter().filter_map(|sample| sample.error.as_ref()) {
            if errors.len() < MAX_ERRORS && !errors.contains(error) {
                errors.push(error.clone());
            }
        }
        let in_window = |sample: &&Sample| begin.map_or((0.0, 0.0), |begin| sample.tokens_since(begin));
        let prompt_in_window: f64 = whole.iter().map(|sample| in_window(sample).0).sum();
        let output_in_window: f64 = whole.iter().map(|sample| in_window(sample).1).sum();
        let ended_in_window = whole.iter().filter(|sample| Some(sample.ended()) > begin).count();
        let per_s = |count: f64| if wall_s > 0.0 { count / wall_s } else { 0.0 };
        Self {
            streams,
            rate,
            num_requests: samples.len() as u64,
            num_ok: count(Outcome::Ok),
            num_failed: count(Outcome::Failed),
            num_truncated: count(Outcome::Truncated),
            num_empty: count(Outcome::Empty),
            num_resumes: samples.iter().map(|sample| u64::from(sample.num_resumes)).sum(),
            num_without_usage: (whole.len() - usages.len()) as u64,
            num_short: whole
                .iter()
                .filter(|sample| {
                    sample.usage.is_some_and(|usage| usage.completion_tokens < u64::from(sample.max_tokens))
                })
                .count() as u64,
            errors,
            wall_s,
            prompt_tokens_mean: prompt_tokens as f64 / usages.len().max(1) as f64,
            cached_tokens: usages
                .iter()
                .filter_map(|usage| usage.prompt_tokens_details)
                .map(|d| d.cached_tokens)
                .sum(),
            completion_tokens,
            output_tokens_per_s: per_s(output_in_window),
            total_tokens_per_s: per_s(prompt_in_window + output_in_window),
            requests_per_s: per_s(ended_in_window as f64),
            ttft_ms: Spread::of(whole.iter().filter_map(|sample| sample.ttft)),
            itl_ms: Spread::of(whole.iter().flat_map(|sample| sample.itl.iter().copied())),
            tpot_ms: Spread::of(whole.iter().filter_map(|sample| sample.tpot())),
            latency_ms: Spread::of(whole.iter().map(|sample| sample.latency)),
            tokens_per_step: None,
            step_ms: None,
            resident_mib: None,
        }
    }

    /// The streams, or the rate, in a word.
    fn load(&self) -> String {
        match self.rate {
            Some(rate) => format!("{rate}/s"),
            None => format!("{} str.", self.streams.unwrap_or(0)),
        }
    }

    /// Whether every stream came whole.
    pub fn is_clean(&self) -> bool {
        self.num_failed + self.num_truncated + self.num_empty == 0 && self.num_ok > 0
    }
}

impl BenchReport {
    /// Whether every stream of every run came whole; if not, the exit status must say so.
    pub fn is_clean(&self) -> bool {
        !self.runs.is_empty() && self.runs.iter().all(RunReport::is_clean)
    }
}

impl fmt::Display for BenchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let in_turn = |lengths: &[u32]| lengths.iter().map(u32::to_string).collect::<Vec<_>>().join(" or ");
        writeln!(f, "{} at {}", self.model, self.base_url)?;
        writeln!(
            f,
            "prompt {} tokens, output {}, seed {}; the first request of each stream warms up\n",
            in_turn(&self.prompt_tokens),
            in_turn(&self.max_tokens),
            self.seed
        )?;
        let row = |f: &mut fmt::Formatter<'_>, name: &str, cell: &dyn Fn(&RunReport) -> String| {
            write!(f, "{name:<20}")?;
            self.runs.iter().try_for_each(|run| write!(f, " {:>10}", cell(run)))?;
            writeln!(f)
        };
        let optional = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
        row(f, "load", &RunReport::load)?;
        row(f, "requests", &|run| run.num_requests.to_string())?;
        row(f, "ok", &|run| run.num_ok.to_string())?;
        row(f, "failed", &|run| run.num_failed.to_string())?;
        row(f, "truncated", &|run| run.num_truncated.to_string())?;
        row(f, "empty", &|run| run.num_empty.to_string())?;
        row(f, "prompt tokens mean", &|run| format!("{:.1}", run.prompt_tokens_mean))?;
        row(f, "output tok/s", &|run| format!("{:.1}", run.output_tokens_per_s))?;
        row(f, "total tok/s", &|run| format!("{:.1}", run.total_tokens_per_s))?;
        row(f, "requests/s", &|run| format!("{:.2}", run.requests_per_s))?;
        type Times = fn(&RunReport) -> Option<Spread>;
        let times: [(&str, Times); 4] = [
            ("TTFT", |run| run.ttft_ms),
            ("ITL", |run| run.itl_ms),
            ("TPOT", |run| run.tpot_ms),
            ("latency", |run| run.latency_ms),
        ];
        for (name, spread) in times {
            let cell = |run: &RunReport, part: fn(Spread) -> f64| optional(spread(run).map(part));
            row(f, &format!("{name} ms p50"), &|run| cell(run, |spread| spread.p50))?;
            row(f, "        p90", &|run| cell(run, |spread| spread.p90))?;
            row(f, "        p99", &|run| cell(run, |spread| spread.p99))?;
            row(f, "        max", &|run| cell(run, |spread| spread.max))?;
        }
        row(f, "tokens a step", &|run| optional(run.tokens_per_step))?;
        row(f, "step ms mean", &|run| optional(run.step_ms))?;
        row(f, "server RSS MiB", &|run| optional(run.resident_mib))?;
        for run in &self.runs {
            self.fmt_notes(f, run)?;
        }
        Ok(())
    }
}

impl BenchReport {
    /// What makes the figures of `run` less than they seem.
    fn fmt_notes(&self, f: &mut fmt::Formatter<'_>, run: &RunReport) -> fmt::Result {
        let load = run.load();
        if run.num_without_usage > 0 {
            let count = run.num_without_usage;
            writeln!(f, "{load}: {count} without token counts; output tok/s leaves them out")?;
        }
        if run.num_short > 0 {
            writeln!(f, "{load}: {} ended before the tokens that were asked for", run.num_short)?;
        }
        if run.num_resumes > 0 {
            writeln!(f, "{load}: {} broken connections were resumed", run.num_resumes)?;
        }
        if run.cached_tokens > 0 {
            writeln!(f, "{load}: {} prompt tokens came from a prefix cache", run.cached_tokens)?;
        }
        run.errors.iter().try_for_each(|error| writeln!(f, "{load}: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use glmserve_client::{Usage, clock};
    use std::time::Instant;

    /// A request of three tokens that was sent at `started`.
    fn sample(started: Instant, outcome: Outcome, ttft_ms: u64, itl_ms: &[u64]) -> Sample {
        let last_content = Duration::from_millis(ttft_ms + itl_ms.iter().sum::<u64>());
        Sample {
            outcome,
            started,
            max_tokens: 3,
            error: (outcome == Outcome::Failed).then(|| "HTTP 429: full".to_owned()),
            ttft: Some(Duration::from_millis(ttft_ms)),
            itl: itl_ms.iter().map(|&ms| Duration::from_millis(ms)).collect(),
            last_content,
            latency: last_content + Duration::from_millis(1),
            usage: Some(Usage { prompt_tokens: 10, completion_tokens: 3, prompt_tokens_details: None }),
            num_resumes: 0,
        }
    }

    #[test]
    fn percentiles_are_real_samples_by_nearest_rank() {
        let spread = |ms: &[u64]| Spread::of(ms.iter().map(|&ms| Duration::from_millis(ms)));
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[7]), Some(Spread { mean: 7.0, p50: 7.0, p90: 7.0, p99: 7.0, max: 7.0 }));
        let hundred: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(
            spread(&hundred),
            Some(Spread { mean: 50.5, p50: 50.0, p90: 90.0, p99: 99.0, max: 100.0 })
        );
    }

    #[test]
    fn broken_streams_are_counted_and_left_out_of_the_figures() {
        let load = Load::Closed { streams: 4, requests_per_stream: 1 };
        let begin = clock::now();
        let later = |ms| begin + Duration::from_millis(ms);
        // It ends 100 ms after `begin`: there the window begins.
        let first = vec![sample(begin, Outcome::Ok, 99, &[])];
        let rest = vec![
            sample(later(40), Outcome::Ok, 50, &[10, 30]),
            sample(later(100), Outcome::Failed, 1, &[1]),
            sample(later(100), Outcome::Failed, 1, &[1]),
            sample(later(597), Outcome::Truncated, 1, &[1]),
        ];
        let samples = Samples { first, rest };
        let run = RunReport::new(load, &samples);
        assert_eq!((run.num_ok, run.num_failed, run.num_truncated, run.num_empty), (1, 2, 1, 0));
        assert_eq!((run.num_requests, run.completion_tokens, run.wall_s), (4, 3, 0.5));
        // The first of the three came before the window, and the prompt with it.
        assert_eq!((run.output_tokens_per_s, run.total_tokens_per_s), (4.0, 4.0));
        assert_eq!(run.requests_per_s, 2.0);
        assert_eq!(run.errors, ["HTTP 429: full"], "the same words once");
        assert_eq!(run.tpot_ms.expect("two later tokens").max, 20.0);
        assert_eq!(run.itl_ms.expect("two gaps").max, 30.0);
        assert!(!run.is_clean());
        let of = |rest| RunReport::new(load, &Samples { first: Vec::new(), rest });
        assert!(!of(Vec::new()).is_clean(), "nothing measured is no success");
        assert!(of(vec![sample(begin, Outcome::Ok, 1, &[])]).is_clean());
    }
}
