//! Owns the fuzzing of the manifest's reader.
//!
//! Claim: any file is a manifest with bounded numbers, or an error.

use glm_engine::Manifest;

use super::folder::Folder;

thread_local! {
    static FOLDER: Folder = Folder::new();
}

/// The bytes are the file.
pub(super) fn run(input: &[u8]) {
    FOLDER.with(|folder| {
        folder.write("manifest.json", input);
        if let Ok(manifest) = Manifest::read(folder.path()) {
            // What everybody computes with it must not overflow.
            let _ = manifest.geometry.kv_bytes_per_token(manifest.graph.kv_cache_dtype);
        }
    });
}
