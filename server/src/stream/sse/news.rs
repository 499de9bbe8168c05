//! Owns what a heartbeat says of a reply that is on its way.

use glm_engine::{Progress, Stage};
use serde_json::{Value, json};

/// How far the reply is, and when to expect its next token.
pub(super) fn news(Progress { stage, estimate }: Progress) -> Value {
    let mut news = match stage {
        Stage::Waiting { position } => json!({"stage": "waiting", "position": position}),
        Stage::Prefill { num_computed_tokens, num_tokens } => {
            json!({"stage": "prefill", "computed_tokens": num_computed_tokens, "prompt_tokens": num_tokens})
        }
        Stage::Decode => json!({"stage": "decode"}),
    };
    if let Some(estimate) = estimate {
        news["estimate_ms"] = json!(u64::try_from(estimate.as_millis()).unwrap_or(u64::MAX));
    }
    news
}
