//! Owns `glmserve chat`: a conversation in the terminal.

use glmserve_client::terminal::{self, ChatArgs};

use crate::serve_error::LoadFailure;

pub(super) fn run(args: ChatArgs) -> Result<(), LoadFailure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(terminal::run(args))?)
}
