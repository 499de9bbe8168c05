//! Owns the fuzz targets: what bytes of a stranger's making may do to each parser of ours.
//!
//! Invariant: a target takes any bytes and panics only if the program under test is wrong, so the same
//! function serves the short run in `cargo test` and the long, coverage-guided one (`make fuzz`).

mod bodies;
mod folder;
mod headers;
mod key_file;
mod manifest;
pub mod mutator;
mod reply_text;
mod sse;

/// One parser under test.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, which is also that of its folder of examples.
    pub name: &'static str,
    /// Feeds it one input.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: [Target; 6] = [
    Target { name: "bodies", run: bodies::run },
    Target { name: "headers", run: headers::run },
    Target { name: "key_file", run: key_file::run },
    Target { name: "manifest", run: manifest::run },
    Target { name: "reply_text", run: reply_text::run },
    Target { name: "sse", run: sse::run },
];

/// The target of this name.
///
/// # Panics
/// There is none.
pub fn target(name: &str) -> Target {
    TARGETS.into_iter().find(|target| target.name == name).unwrap_or_else(|| panic!("no fuzz target {name}"))
}
