//! Owns `glmserve chat`: a conversation in the terminal.

use glmserve_client::terminal::{self, ChatArgs};

use super::Outcome;

pub(super) fn run(args: ChatArgs) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(terminal::run(args))?)
}
