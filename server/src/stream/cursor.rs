//! Owns the names of a stream's documents: what `id:` carries out and `Last-Event-ID` brings back.
//!
//! Invariants: a cursor is a place in the reply's log, so it means the same to every reader, at any time; an
//! event id names its stream too, so that the place is never looked up in another reply, such as the one that
//! took over its key. To clients an id is opaque.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use super::names::StreamId;

/// The place of one document: the log's event, and which of its documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// Index of the event in the log.
    pub event: usize,
    /// Which of its documents: a finish has the finish chunk and, if asked for, the usage chunk.
    pub document: usize,
}

/// Tells the streams of one owner apart: 32 bits of a hash, as the id itself opens the stream to who has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamTag([u8; 4]);

impl StreamTag {
    /// The tag of a stream.
    pub fn of(id: &StreamId) -> Self {
        let [a, b, c, d, ..]: [u8; 32] = Sha256::digest(id.to_string()).into();
        Self([a, b, c, d])
    }
}

/// The name of one document among those of all streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventId {
    /// Its stream.
    pub stream: StreamTag,
    /// Its place there.
    pub cursor: Cursor,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stream: StreamTag(tag), cursor: Cursor { event, document } } = self;
        write!(f, "{:08x}.{event}.{document}", u32::from_be_bytes(*tag))
    }
}

impl FromStr for EventId {
    type Err = ();

    /// Takes exactly what [`fmt::Display`] writes: no signs, spaces, capitals or leading zeros.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (tag, cursor) = text.split_once('.').ok_or(())?;
        let (event, document) = cursor.split_once('.').ok_or(())?;
        let tag = u32::from_str_radix(tag, 16).map_err(drop)?;
        let cursor =
            Cursor { event: event.parse().map_err(drop)?, document: document.parse().map_err(drop)? };
        let id = Self { stream: StreamTag(tag.to_be_bytes()), cursor };
        (id.to_string() == text).then_some(id).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_written_is_read() {
        let stream = StreamTag([0, 0xab, 1, 2]);
        for cursor in [Cursor { event: 0, document: 0 }, Cursor { event: 4096, document: 1 }] {
            let id = EventId { stream, cursor };
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        let id = EventId { stream, cursor: Cursor { event: 4096, document: 1 } };
        assert_eq!(id.to_string(), "00ab0102.4096.1");
        for garbage in [
            "",
            "..",
            "1.0",
            "00ab0102",
            "00ab0102.1",
            "00ab0102.1.",
            "00ab0102..1",
            "00ab0102.1.2.3",
            "00ab0102.01.0",
            "00ab0102.1.00",
            "00ab0102.+1.0",
            "+0ab0102.1.0",
            "00AB0102.1.0",
            "ab0102.1.0",
            "000ab0102.1.0",
            "1f00ab0102.1.0",
            " 00ab0102.1.0",
            "00ab0102.1.0 ",
            "00ab0102.1.x",
            "00ab0102.99999999999999999999.0",
        ] {
            assert_eq!(garbage.parse::<EventId>(), Err(()), "{garbage:?}");
        }
    }

    #[test]
    fn streams_have_tags_of_their_own_that_are_no_part_of_their_names() {
        let [a, b] = ["0123456789abcdef0123", "0123456789abcdef0124"].map(StreamId::given);
        assert_eq!(StreamTag::of(&a), StreamTag::of(&a));
        assert_ne!(StreamTag::of(&a), StreamTag::of(&b));
        let id = EventId { stream: StreamTag::of(&a), cursor: Cursor { event: 0, document: 0 } };
        assert!(!id.to_string().starts_with("01234567"));
    }
}
