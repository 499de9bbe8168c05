//! Owns `known_answer.json`: the logits that the exporter's own reading of the graph gives for one
//! prompt, and how far a machine's may be from them.
//!
//! Invariant: logits are compared less the mean of their row and in units of its standard deviation:
//! neither a common offset nor the scale of a model's logits changes what is tolerated.

use std::path::{Path, PathBuf};

use ndarray::ArrayView2;
use serde::Deserialize;

use crate::error::LoadError;
use crate::model::manifest::Manifest;

/// The file's name in a model folder.
pub const KNOWN_ANSWER_FILE: &str = "known_answer.json";
/// The schema version that this build reads.
const SCHEMA_VERSION: u64 = 1;
/// How many times the tolerated error of all logits one of them may be off: among hundreds, a normally
/// distributed error is seldom larger.
const SINGLE: f64 = 4.0;

/// A prompt and what a faithful machine makes of it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownAnswer {
    /// Must equal the version that this build reads.
    pub schema_version: u64,
    /// The prompt.
    pub token_ids: Vec<u32>,
    /// Rows of logits that are known in part.
    pub rows: Vec<KnownRow>,
    /// Root of the mean square of all differences that is tolerated.
    pub tolerance: f64,
}

/// What is known of the logits after one position.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownRow {
    /// Index into the prompt.
    pub position: usize,
    /// The largest logits with their ids, the largest first.
    pub top: Vec<(u32, f64)>,
    /// Mean over the vocabulary.
    pub mean: f64,
    /// Standard deviation over the vocabulary.
    pub deviation: f64,
}

/// How near a machine came.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Agreement {
    /// Root of the mean square of all differences, in standard deviations of their rows.
    pub error: f64,
    /// What was tolerated.
    pub tolerance: f64,
}

/// Where a machine differs from what was exported.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Mismatch {
    /// Not enough logits.
    #[error("the logits have the shape {found:?}, expected at least {expected:?}")]
    Shape {
        /// Rows and columns.
        found: (usize, usize),
        /// What the prompt and the vocabulary need.
        expected: (usize, usize),
    },
    /// Infinite or no numbers.
    #[error("the logits at position {position} are not finite")]
    NotFinite {
        /// Index into the prompt.
        position: usize,
    },
    /// One logit is too far off.
    #[error(
        "the logit of token {id} at position {position} is {found:.3}, expected {expected:.3} ± {tolerance:.3}"
    )]
    Logit {
        /// Index into the prompt.
        position: usize,
        /// The token.
        id: u32,
        /// Moved by the difference of the rows' means.
        found: f64,
        /// What the exporter computed.
        expected: f64,
        /// What is tolerated here.
        tolerance: f64,
    },
    /// Another token is the most likely one, where there is no doubt which it is.
    #[error(
        "the first choice at position {position} is token {found}, expected {expected}, which leads by {margin:.3} \
         with {tolerance:.3} tolerated"
    )]
    FirstChoice {
        /// Index into the prompt.
        position: usize,
        /// The machine's.
        found: u32,
        /// The exporter's.
        expected: u32,
        /// Between the exporter's first and second logit.
        margin: f64,
        /// What is tolerated of one logit.
        tolerance: f64,
    },
    /// No logit stands out, but all together are too far off.
    #[error("all logits together are off by {error:.2e} deviations, {tolerance:.2e} is tolerated")]
    Overall {
        /// Root of the mean square.
        error: f64,
        /// What is tolerated.
        tolerance: f64,
    },
}

impl KnownAnswer {
    /// Reads the file of the folder `dir`; `None` where the manifest lists none.
    ///
    /// # Errors
    /// [`LoadError`] names the file and the field.
    pub fn load(dir: &Path, manifest: &Manifest) -> Result<Option<Self>, LoadError> {
        if !manifest.files.contains_key(KNOWN_ANSWER_FILE) {
            return Ok(None);
        }
        let path = dir.join(KNOWN_ANSWER_FILE);
        let text =
            std::fs::read_to_string(&path).map_err(|source| LoadError::Io { path: path.clone(), source })?;
        Self::parse(&text, path, manifest.geometry.vocab_size).map(Some)
    }

    fn parse(text: &str, path: PathBuf, vocab_size: usize) -> Result<Self, LoadError> {
        let bad = |message: String| LoadError::KnownAnswer { path: path.clone(), message };
        let value: serde_json::Value = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        let found =
            value["schema_version"].as_u64().ok_or_else(|| bad("schema_version is missing".into()))?;
        if found != SCHEMA_VERSION {
            return Err(LoadError::SchemaVersion { path, found, expected: SCHEMA_VERSION });
        }
        let answer: Self = serde_json::from_value(value).map_err(|e| bad(e.to_string()))?;
        answer.check(vocab_size).map_err(bad)?;
        Ok(answer)
    }

    fn check(&self, vocab_size: usize) -> Result<(), String> {
        let ids = self.rows.iter().flat_map(|row| row.top.iter().map(|(id, _)| id)).chain(&self.token_ids);
        if let Some(id) = ids.into_iter().find(|id| **id as usize >= vocab_size) {
            return Err(format!("token id {id} is not below the model's vocab_size {vocab_size}"));
        }
        if self.rows.is_empty() {
            return Err("rows is empty: it would agree with everything".into());
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if !positive(self.tolerance) {
            return Err(format!("tolerance {} is not a positive number", self.tolerance));
        }
        for row in &self.rows {
            if row.position >= self.token_ids.len() {
                let len = self.token_ids.len();
                return Err(format!("rows: position {} is not in the prompt of {len} tokens", row.position));
            }
            if row.top.len() < 2 || !row.top.is_sorted_by(|a, b| a.1 >= b.1) {
                return Err(format!("rows: top of position {} is not two or more in order", row.position));
            }
            if !positive(row.deviation) {
                return Err(format!("rows: deviation of position {} is not positive", row.position));
            }
        }
        Ok(())
    }

    /// Compares the logits of every position of the prompt; columns from `vocab_size` on are padding.
    ///
    /// # Errors
    /// [`Mismatch`]: the most telling difference.
    pub fn compare(&self, logits: ArrayView2<'_, f32>, vocab_size: usize) -> Result<Agreement, Mismatch> {
        let expected = (self.token_ids.len(), vocab_size);
        let found = logits.dim();
        if found.0 < expected.0 || found.1 < expected.1 {
            return Err(Mismatch::Shape { found, expected });
        }
        let (mut sum, mut count) = (0.0, 0);
        for row in &self.rows {
            let found = logits.row(row.position);
            let found: Vec<f64> = found.iter().take(vocab_size).map(|&value| f64::from(value)).collect();
            for error in row.errors(&found, SINGLE * self.tolerance)? {
                sum += error * error;
                count += 1;
            }
        }
        let error = (sum / f64::from(count)).sqrt();
        match error <= self.tolerance {
            true => Ok(Agreement { error, tolerance: self.tolerance }),
            false => Err(Mismatch::Overall { error, tolerance: self.tolerance }),
        }
    }
}

impl KnownRow {
    /// The difference of each logit that is known, none above `tolerance`; both in deviations.
    fn errors(&self, found: &[f64], tolerance: f64) -> Result<Vec<f64>, Mismatch> {
        let position = self.position;
        let shift = self.mean - found.iter().sum::<f64>() / found.len() as f64;
        if !shift.is_finite() {
            return Err(Mismatch::NotFinite { position });
        }
        let tolerance = tolerance * self.deviation;
        let differences = self.top.iter().map(|&(id, expected)| {
            let found = found[id as usize] + shift;
            match (found - expected).abs() <= tolerance {
                true => Ok((found - expected) / self.deviation),
                false => Err(Mismatch::Logit { position, id, found, expected, tolerance }),
            }
        });
        let errors = differences.collect::<Result<_, _>>()?;
        let best = (0..found.len()).max_by(|&a, &b| found[a].total_cmp(&found[b])).unwrap_or_default() as u32;
        let (first, margin) = (self.top[0].0, self.top[0].1 - self.top[1].1);
        match best != first && margin > 2.0 * tolerance {
            true => Err(Mismatch::FirstChoice { position, found: best, expected: first, margin, tolerance }),
            false => Ok(errors),
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, array};
    use serde_json::{Value, json};

    use super::*;

    /// Two rows over a vocabulary of four; the fifth column is padding.
    fn sample() -> Value {
        json!({"schema_version": 1, "token_ids": [3, 1], "tolerance": 0.1, "rows": [
            {"position": 0, "top": [[2, 6.0], [0, 2.0]], "mean": 2.0, "deviation": 2.0},
            {"position": 1, "top": [[1, 3.0], [3, 1.0]], "mean": 1.0, "deviation": 1.0}]})
    }

    fn logits() -> Array2<f32> {
        array![[2.0, 0.5, 6.0, -0.5, 90.0], [0.5, 3.0, -0.5, 1.0, 90.0]]
    }

    fn compare(logits: &Array2<f32>) -> Result<Agreement, Mismatch> {
        parse(&sample()).unwrap().compare(logits.view(), 4)
    }

    fn parse(value: &Value) -> Result<KnownAnswer, LoadError> {
        KnownAnswer::parse(&value.to_string(), PathBuf::from("known_answer.json"), 4)
    }

    #[test]
    fn equal_logits_agree_and_a_common_offset_is_none() {
        assert_eq!(compare(&logits()).unwrap().error, 0.0);
        assert!(compare(&(logits() + 5.0)).unwrap().error < 1e-6);
    }

    #[test]
    fn one_logit_far_off_is_named() {
        // Off by 1.6 where 0.8 is tolerated; a quarter of it goes to the mean.
        let mut found = logits();
        found[(0, 2)] -= 1.6;
        let error = compare(&found).unwrap_err();
        assert!(matches!(error, Mismatch::Logit { position: 0, id: 2, .. }), "{error}");
        assert_eq!(error.to_string(), "the logit of token 2 at position 0 is 4.800, expected 6.000 ± 0.800");
    }

    #[test]
    fn many_logits_a_little_off_are_too_much() {
        // Each by 0.3 deviations: single ones may be off by 0.4.
        let mut found = logits();
        for (row, first, second, by) in [(0, 2, 0, 0.6), (1, 1, 3, 0.3)] {
            found[(row, first)] += by;
            found[(row, second)] -= by;
        }
        let error = compare(&found).unwrap_err();
        assert!(matches!(error, Mismatch::Overall { .. }), "{error}");
    }

    #[test]
    fn a_token_that_is_not_recorded_may_not_come_first() {
        let mut found = logits();
        found[(1, 0)] = 3.5;
        found[(1, 2)] = -3.5;
        let error = compare(&found).unwrap_err();
        assert!(matches!(error, Mismatch::FirstChoice { position: 1, found: 0, expected: 1, .. }), "{error}");
    }

    #[test]
    fn what_is_no_number_never_agrees() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut found = logits();
            found[(1, 2)] = value;
            assert_eq!(compare(&found), Err(Mismatch::NotFinite { position: 1 }));
        }
        let found = Array2::zeros((1, 5));
        assert!(matches!(compare(&found), Err(Mismatch::Shape { found: (1, 5), expected: (2, 4) })));
    }

    #[test]
    fn what_is_wrong_in_the_file_is_named() {
        let cases = [
            ("/schema_version", json!(2), "schema_version 2"),
            ("/tolerance", json!(0), "tolerance 0"),
            ("/rows", json!([]), "rows is empty"),
            ("/token_ids", json!([3]), "position 1 is not in the prompt"),
            ("/token_ids/0", json!(4), "token id 4"),
            ("/rows/0/top/1/0", json!(9), "token id 9"),
            ("/rows/0/top/1/1", json!(7.0), "top of position 0"),
            ("/rows/1/deviation", json!(-1), "deviation of position 1"),
            ("/rows/1/mean", json!("x"), "invalid type"),
        ];
        for (pointer, value, words) in cases {
            let mut damaged = sample();
            *damaged.pointer_mut(pointer).unwrap() = value;
            let error = parse(&damaged).unwrap_err().to_string();
            assert!(error.contains(words), "{pointer}: {error}");
            assert!(error.contains("known_answer.json"), "{error}");
        }
    }
}
