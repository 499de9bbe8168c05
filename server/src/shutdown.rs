//! Owns the end of the server: which signals count, and what happens between the first and the exit.
//!
//! Invariant: every accepted stream gets its terminal event and `[DONE]` before the sockets close, if its client
//! takes them: a drain waits for readers, not only for replies. A second signal ends the drain early; only a third
//! says that nobody cares.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::engine_failure::{ENGINE_FAILED_EXIT_CODE, EngineFailure};
use crate::lifecycle::Lifecycle;
use crate::state::AppState;

/// How long streams may take to hear that the engine has failed; the process ends soon after.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the engine may take to end what it was told to end: one step, however long.
const ABORT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long clients may take to read the error that ends their streams, and what is before it in the buffers.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks at what has arrived.
const LOOK_PERIOD: Duration = Duration::from_millis(20);
/// Looks in a row that find nothing on its way: between a body's end and its last write there is a moment.
const NUM_LOOKS: u32 = 2;

/// A channel that hears SIGTERM and SIGINT. SIGHUP, which would end the process, is taken and ignored: terminals and
/// log rotation send it, and are not meant to cut streams.
///
/// # Errors
/// The operating system refuses a handler.
pub fn signals() -> std::io::Result<mpsc::Receiver<()>> {
    let (sender, receiver) = mpsc::channel(2);
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut stream = signal(kind)?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                // Full after two, and more say nothing new.
                let _ = sender.try_send(());
            }
        });
    }
    let mut hangups = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        if hangups.recv().await.is_some() {
            tracing::warn!("SIGHUP has no effect; restart to reload the configuration");
        }
        // The handler stays when its stream is gone.
    });
    Ok(receiver)
}

/// Waits for a signal, then until the running replies have ended and every client has got what it reads. Returns
/// whether all of them have.
pub async fn drain(lifecycle: &Lifecycle, state: &AppState, signals: &mut mpsc::Receiver<()>) -> bool {
    signals.recv().await;
    tracing::info!(num_streams = state.pumps.len(), num_readers = state.readers.len(), "draining");
    state.start_draining();
    state.pumps.close();
    tokio::select! {
        () = delivered(lifecycle, state) => return true,
        () = tokio::time::sleep(state.options.drain_timeout) => {}
        Some(()) = signals.recv() => {}
    }
    let (num_streams, num_readers) = (state.pumps.len(), state.readers.len());
    tracing::warn!(num_streams, num_readers, "the drain time is over");
    state.engine.abort_all();
    state.readers.cut_short();
    let ended = async {
        let aborted = tokio::time::timeout(ABORT_TIMEOUT, state.pumps.wait()).await;
        aborted.is_ok() && tokio::time::timeout(GOODBYE_TIMEOUT, delivered(lifecycle, state)).await.is_ok()
    };
    tokio::select! {
        ended = ended => ended,
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

/// Waits until no reply runs, no answer is being sent, and what was sent has arrived.
async fn delivered(lifecycle: &Lifecycle, state: &AppState) {
    let mut num_looks = 0;
    while num_looks < NUM_LOOKS {
        state.pumps.wait().await;
        state.readers.wait().await;
        num_looks = if lifecycle.connections.have_arrived() { num_looks + 1 } else { 0 };
        tokio::time::sleep(LOOK_PERIOD).await;
    }
}
