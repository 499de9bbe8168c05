//! Owns what a bench reads about the server from outside its streams: its counters and its memory.
//!
//! Invariant: what cannot be read is absent, never zero.

use std::path::Path;

/// The counters that say how well the engine batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Counters {
    pub(super) num_steps: Option<f64>,
    pub(super) num_generation_tokens: Option<f64>,
    pub(super) step_seconds: Option<f64>,
    pub(super) resident_bytes: Option<f64>,
}

impl Counters {
    /// Reads them from the text of a Prometheus endpoint.
    pub(super) fn parse(text: &str) -> Self {
        Self {
            num_steps: sum(text, "glmserve_engine_steps_total"),
            num_generation_tokens: sum(text, "glmserve_generation_tokens_total"),
            step_seconds: sum(text, "glmserve_step_duration_seconds_sum"),
            resident_bytes: sum(text, "process_resident_memory_bytes"),
        }
    }

    /// Tokens generated per engine step between `before` and `self`.
    pub(super) fn tokens_per_step(&self, before: &Self) -> Option<f64> {
        let num_steps = self.num_steps? - before.num_steps?;
        let num_tokens = self.num_generation_tokens? - before.num_generation_tokens?;
        (num_steps > 0.0).then(|| num_tokens / num_steps)
    }

    /// Mean milliseconds of an engine step between `before` and `self`.
    pub(super) fn step_ms(&self, before: &Self) -> Option<f64> {
        let num_steps = self.num_steps? - before.num_steps?;
        let seconds = self.step_seconds? - before.step_seconds?;
        (num_steps > 0.0).then(|| seconds * 1e3 / num_steps)
    }
}

/// The sum of a metric over its labels.
fn sum(text: &str, name: &str) -> Option<f64> {
    text.lines().filter_map(|line| value_of(line, name)).reduce(|sum, value| sum + value)
}

fn value_of(line: &str, name: &str) -> Option<f64> {
    let rest = line.strip_prefix(name)?;
    let value = match rest.as_bytes().first()? {
        b' ' => rest,
        // A label's value may hold a brace; the value after the labels may not.
        b'{' => &rest[rest.rfind('}')? + 1..],
        _ => return None,
    };
    // A timestamp may follow the value.
    value.split_whitespace().next()?.parse().ok()
}

/// The resident memory of a process of this machine, in bytes.
pub(super) fn resident_bytes(pid: u32) -> Option<f64> {
    let path = Path::new("/proc").join(pid.to_string()).join("status");
    let status = std::fs::read_to_string(path).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_summed_over_labels_and_absent_ones_stay_absent() {
        let before = Counters::parse(
            "# HELP glmserve_engine_steps_total steps\n# TYPE glmserve_engine_steps_total counter\n\
             glmserve_engine_steps_total 10\n\
             glmserve_generation_tokens_total{model=\"a}b\"} 5 1700000000000\n\
             glmserve_generation_tokens_total{model=\"c\"} 15\n\
             glmserve_generation_tokens_total_other 99\n",
        );
        assert_eq!(before.num_steps, Some(10.0));
        assert_eq!(before.num_generation_tokens, Some(20.0));
        assert_eq!(before.resident_bytes, None);
        let after = Counters { num_steps: Some(20.0), num_generation_tokens: Some(60.0), ..before };
        assert_eq!(after.tokens_per_step(&before), Some(4.0));
        assert_eq!(after.step_ms(&before), None, "its time is not told");
        let timed = |counters: Counters, seconds| Counters { step_seconds: Some(seconds), ..counters };
        assert_eq!(timed(after, 0.75).step_ms(&timed(before, 0.5)), Some(25.0));
        assert_eq!(before.tokens_per_step(&before), None, "no step was made");
        assert_eq!(after.tokens_per_step(&Counters::default()), None);
    }

    #[test]
    fn this_process_has_memory_and_a_missing_one_has_none() {
        assert!(resident_bytes(std::process::id()).expect("this process runs") > 1e5);
        assert_eq!(resident_bytes(u32::MAX), None);
    }
}
