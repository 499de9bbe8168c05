//! Owns the fuzzing of request bodies, from bytes to a typed request.
//!
//! Claims: a body is a request, or an error with a status of a client's mistake that names what is wrong;
//! and a request asks for the same, whatever white space is around it.

use glmserve::error::ApiError;
use glmserve::request_fingerprint;

/// The bytes are the body.
pub(super) fn run(input: &[u8]) {
    match request_fingerprint(input) {
        Err(error) => is_a_clients_mistake(&error),
        Ok(fingerprint) => {
            let spaced = [b" \n".as_slice(), input, b"\t "].concat();
            match request_fingerprint(&spaced) {
                Ok(again) => assert_eq!(fingerprint, again, "white space changes what is asked for"),
                // A byte order mark is the first thing in a body or nothing.
                Err(error) => assert!(input.starts_with(b"\xef\xbb\xbf"), "with white space: {error}"),
            }
        }
    }
}

fn is_a_clients_mistake(error: &ApiError) {
    let body = error.body();
    let error = &body["error"];
    assert_eq!(error["type"], "invalid_request_error", "{body}");
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{body}");
}
