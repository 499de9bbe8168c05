//! The `glmserve` program: reads the command line and hands over to the library.

use std::io::Write;
use std::process::ExitCode;

use glmserve::commands;
use glmserve::config::Cli;

fn main() -> ExitCode {
    // ONNX Runtime's own telemetry, which writes a device id before any session can turn it off.
    // SAFETY: no other thread exists yet that could read the environment.
    unsafe { std::env::set_var("ORT_DISABLE_TELEMETRY", "1") };
    match commands::run(Cli::read().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not eprintln: it panics when nobody takes what it prints.
            let _ = writeln!(std::io::stderr(), "glmserve: {error}");
            ExitCode::FAILURE
        }
    }
}
