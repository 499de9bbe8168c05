//! Owns the fuzzing of the client's event-stream parser.
//!
//! Claims: the frames do not depend on how the bytes were cut, and none outgrows the limit.

use std::collections::VecDeque;

use glmserve_client::sse::{EventTooLong, Frame, Parser};

const MAX_EVENT_BYTES: usize = 256;

/// The first byte says how the rest is cut.
pub(super) fn run(input: &[u8]) {
    let Some((&step, bytes)) = input.split_first() else { return };
    let whole = read([bytes]);
    let parts = read(bytes.chunks(usize::from(step % 16) + 1));
    // A part before the one that is too long may have given frames that the whole did not get to.
    assert_eq!(whole.0, parts.0, "frames depend on how the bytes were cut");
    assert_eq!(whole.1, parts.1, "the limit depends on how the bytes were cut");
    for frame in whole.0 {
        let length = match frame {
            Frame::Event { data, .. } => data.len(),
            Frame::Comment(text) => text.len(),
        };
        assert!(length <= 3 * MAX_EVENT_BYTES, "a frame of {length} bytes");
    }
}

fn read<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> (VecDeque<Frame>, Result<(), EventTooLong>) {
    let mut parser = Parser::new(MAX_EVENT_BYTES);
    let mut frames = VecDeque::new();
    let result = parts.into_iter().try_for_each(|part| parser.push(part, &mut frames));
    (frames, result)
}
