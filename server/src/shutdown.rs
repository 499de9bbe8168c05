//! Owns the end of the server: which signals count, and what happens between the first and the exit.
//!
//! Invariant: every accepted stream gets its terminal event and `[DONE]` before the sockets close. A
//! second signal ends the drain early; only a third says that nobody cares.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::engine_watch::{ENGINE_FAILED_EXIT_CODE, EngineFailure};
use crate::state::AppState;

/// How long streams may take to hear that the engine has failed; the process ends soon after.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the engine may take to end what it was told to end: one step, however long.
const ABORT_TIMEOUT: Duration = Duration::from_secs(10);

/// A channel that hears SIGTERM, SIGINT and SIGHUP.
///
/// # Errors
/// The operating system refuses a handler.
pub fn signals() -> std::io::Result<mpsc::Receiver<()>> {
    let (sender, receiver) = mpsc::channel(2);
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()] {
        let mut stream = signal(kind)?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                // Full after two, and more say nothing new.
                let _ = sender.try_send(());
            }
        });
    }
    Ok(receiver)
}

/// Waits for a signal, then for the running streams. Returns whether there is time for goodbyes.
pub async fn drain(state: &AppState, signals: &mut mpsc::Receiver<()>) -> bool {
    signals.recv().await;
    tracing::info!(num_streams = state.pumps.len(), "draining");
    state.start_draining();
    state.pumps.close();
    tokio::select! {
        () = state.pumps.wait() => return true,
        () = tokio::time::sleep(state.options.drain_timeout) => {}
        Some(()) = signals.recv() => {}
    }
    tracing::warn!(num_streams = state.pumps.len(), "the drain time is over");
    state.engine.abort_all();
    tokio::select! {
        done = tokio::time::timeout(ABORT_TIMEOUT, state.pumps.wait()) => done.is_ok(),
        Some(()) = signals.recv() => false,
    }
}

/// Ends every stream with its typed error because the engine has failed for good.
pub(crate) async fn give_up(state: &AppState, failure: &EngineFailure) {
    tracing::error!(
        num_streams = state.pumps.len(),
        exit_code = ENGINE_FAILED_EXIT_CODE,
        "{failure}; only a new process can serve again, so this one ends"
    );
    state.set_engine_failed();
    state.start_draining();
    state.pumps.close();
    state.engine.abort_all();
    if tokio::time::timeout(GIVE_UP_TIMEOUT, state.pumps.wait()).await.is_err() {
        tracing::error!(num_streams = state.pumps.len(), "the engine does not even end its streams");
    }
}
