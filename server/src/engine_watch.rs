//! Owns the watch over a serving engine: after a fault the known answer is asked for again and again, and
//! an engine that only a new process heals ends this one.
//!
//! Invariant: load is no fault. The process ends only if the engine's thread has ended, or if the engine
//! was at fault and did not give its known answer once for as long as the configuration allows.

use std::convert::Infallible;
use std::time::Duration;

use glm_engine::{EngineStatus, Fault};
use tokio::time::Instant;

use crate::engine_failure::EngineFailure;
use crate::known_answer;
use crate::state::AppState;

/// Between two looks at the engine and the store of streams.
const PERIOD: Duration = Duration::from_secs(1);
/// The least time that the engine has for an answer, however short the configured time is.
const MIN_ANSWER_TIME: Duration = Duration::from_secs(5);

/// Looks after the engine and the store of streams until the engine has failed for good.
pub(crate) async fn look_after(state: &AppState) -> EngineFailure {
    tokio::select! {
        never = keep_sweeping(state) => match never {},
        failure = watch(state) => failure,
    }
}

async fn keep_sweeping(state: &AppState) -> Infallible {
    loop {
        tokio::time::sleep(PERIOD).await;
        state.streams.sweep();
    }
}

async fn watch(state: &AppState) -> EngineFailure {
    // Since when every known answer was missing or wrong.
    let mut since = None;
    loop {
        tokio::time::sleep(PERIOD).await;
        if let Some(failure) = failure(&state.engine.status()) {
            return failure;
        }
        let Some((fault, seen)) = state.engine.fault() else {
            since = None;
            continue;
        };
        let started = *since.get_or_insert_with(Instant::now);
        let limit = state.options.fault_exit_timeout;
        tracing::warn!(?fault, "asking the engine for the known answer");
        match ask(state, limit.map(|limit| started + limit)).await {
            Ok(()) => {
                since = None;
                match state.engine.clear_fault(seen) {
                    true => tracing::info!("the engine gave the known answer; ready again"),
                    false => tracing::warn!("the engine gave the known answer, and had another fault since"),
                }
            }
            // Why is found above, at the next look.
            Err(_) if !state.engine.status().alive => {}
            Err(reason) => {
                tracing::error!(reason, "still unready");
                let waited = started.elapsed();
                if limit.is_some_and(|limit| waited >= limit) {
                    return EngineFailure::NotHealed { fault, waited };
                }
            }
        }
    }
}

/// An engine whose thread has ended does not come back.
fn failure(status: &EngineStatus) -> Option<EngineFailure> {
    match status.fault {
        _ if status.alive => None,
        Some(Fault::DeviceLost) => Some(EngineFailure::DeviceLost),
        _ => Some(EngineFailure::Died),
    }
}

/// Asks for the known answer, until `deadline` if it is not too near.
async fn ask(state: &AppState, deadline: Option<Instant>) -> Result<(), String> {
    let answer = known_answer::ask(&state.engine, &state.known_answer);
    let Some(deadline) = deadline else { return answer.await };
    let deadline = deadline.max(Instant::now() + MIN_ANSWER_TIME);
    match tokio::time::timeout_at(deadline, answer).await {
        Ok(answer) => answer,
        Err(_) => Err("the engine gave no answer at all".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_engine_that_has_ended_has_failed() {
        let status = |alive, fault| EngineStatus { alive, fault, ..EngineStatus::default() };
        for fault in [None, Some(Fault::NonFiniteLogits), Some(Fault::RepeatedRunErrors { count: 9 })] {
            assert_eq!(failure(&status(true, fault)), None);
            assert_eq!(failure(&status(false, fault)), Some(EngineFailure::Died));
        }
        let lost = status(false, Some(Fault::DeviceLost));
        assert_eq!(failure(&lost), Some(EngineFailure::DeviceLost));
    }
}
