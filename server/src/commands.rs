//! Owns what `glmserve` can be told to do, a command each.
//!
//! Invariant: each ends with an error for its caller, and never with a panic.

mod bench;
mod chat;
mod check;
mod log;
mod logits;
mod npy;
mod plan;
mod serve;

use crate::config::Command;
use crate::serve_error::LoadFailure;

/// Does what the command line says.
///
/// # Errors
/// What went wrong, in words for the person who called the command.
pub fn run(command: Command) -> Result<(), LoadFailure> {
    match command {
        Command::Serve(args) => serve::run(*args),
        Command::Check(args) => check::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Bench(args) => bench::run(args),
        Command::Chat(args) => chat::run(args),
    }
}
