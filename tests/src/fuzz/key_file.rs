//! Owns the fuzzing of the API key file's reader.
//!
//! Claim: any file gives at least one key, or an error that does not repeat a key.

use glmserve::api_keys::ApiKeys;

use super::folder::Folder;

/// Shorter words of a file may well be part of an error's own words.
const MIN_SECRET_BYTES: usize = 12;

thread_local! {
    static FOLDER: Folder = Folder::new();
}

/// The bytes are the file.
pub(super) fn run(input: &[u8]) {
    let path = FOLDER.with(|folder| folder.write("keys", input));
    match ApiKeys::load(&path) {
        Ok(keys) => assert!(!keys.weights().is_empty(), "a key file without keys was taken"),
        Err(error) => {
            let (error, text) = (error.to_string(), String::from_utf8_lossy(input));
            let firsts = text.lines().filter_map(|line| line.split_whitespace().next());
            for word in firsts.filter(|word| word.len() >= MIN_SECRET_BYTES) {
                assert!(!error.contains(word), "the error repeats a key: {error}");
            }
        }
    }
}
