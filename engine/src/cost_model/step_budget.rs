//! Owns what a step may spend beside its decodes.

use super::PrefillBudget;

/// What a step may spend beside its decodes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepBudget {
    /// Prompts.
    pub prefill: PrefillBudget,
    /// The least probability of being accepted at which a draft token is computed; 1 is none.
    pub draft_price: f64,
}

impl<T: Into<PrefillBudget>> From<T> for StepBudget {
    /// Prompts only.
    fn from(prefill: T) -> Self {
        Self { prefill: prefill.into(), draft_price: 1.0 }
    }
}
