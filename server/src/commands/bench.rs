//! Owns `glmserve bench`: load on a server, and what it measures.

use glmserve_bench::BenchArgs;

use crate::serve_error::LoadFailure;

pub(super) fn run(args: BenchArgs) -> Result<(), LoadFailure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(glmserve_bench::run(args))?;
    println!("{report}");
    match report.is_clean() {
        true => Ok(()),
        false => Err("not every stream came whole; the figures above are of those that did".into()),
    }
}
