//! Owns how one JSON document becomes a server-sent event, with an `id:` if a reader could come back to it.
//!
//! Invariant: a document has the same position, and so the same id, for every reader.

use std::fmt::Write as _;

use actix_web::web::BytesMut;
use serde::Serialize;

use crate::json;
use crate::stream::cursor::{Cursor, EventId, StreamTag};
use crate::stream::event::Event;

/// Makes the JSON documents of one event.
pub trait Render {
    /// Adds the documents for `event` to `documents`. What they are depends on the event alone, so that
    /// each has the same position for every reader.
    fn render(&mut self, event: Event, documents: &mut Documents<'_>);
}

/// Takes the documents of one event, and writes each as a server-sent event of its own.
#[derive(Debug)]
pub struct Documents<'a> {
    pub(super) frames: &'a mut BytesMut,
    pub(super) cursor: Cursor,
    /// The last document that the client has.
    pub(super) after: Option<Cursor>,
    /// Whose they are, if they have ids.
    pub(super) stream: Option<StreamTag>,
}

impl Documents<'_> {
    /// Adds one more.
    pub fn push(&mut self, document: &impl Serialize) {
        if self.after < Some(self.cursor) {
            if let Some(stream) = self.stream {
                // Writing to memory does not fail.
                let _ = writeln!(self.frames, "id: {}", EventId { stream, cursor: self.cursor });
            }
            self.frames.extend_from_slice(b"data: ");
            json::append(self.frames, document);
            self.frames.extend_from_slice(b"\n\n");
        }
        self.cursor.document += 1;
    }
}
