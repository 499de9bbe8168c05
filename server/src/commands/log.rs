//! Owns the log of the process: its form, and what it keeps.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;
use crate::serve_error::LoadFailure;

/// Starts it.
///
/// # Errors
/// `RUST_LOG` can not be read.
pub(super) fn start(format: LogFormat) -> Result<(), LoadFailure> {
    let log = tracing_subscriber::fmt()
        .with_env_filter(log_filter()?)
        .with_ansi(std::io::stderr().is_terminal())
        // It would print its own failures and panic if that fails too: a lost log must not cost a reply.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

/// What RUST_LOG says, or the default where it is unset or empty.
fn log_filter() -> Result<EnvFilter, LoadFailure> {
    let text = std::env::var_os("RUST_LOG").unwrap_or_default();
    let text = text.to_str().ok_or("RUST_LOG is not UTF-8 text")?;
    let text = if text.is_empty() { "info,ort=warn,actix_server=warn" } else { text };
    EnvFilter::try_new(text).map_err(|error| format!("RUST_LOG={text:?} can't be read: {error}").into())
}
