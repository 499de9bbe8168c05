//! Owns the names of a stream's documents: what `id:` carries out and `Last-Event-ID` brings back.
//!
//! Invariant: a name is a place in the reply's log, so it means the same to every reader, at any time.

use std::fmt;
use std::str::FromStr;

/// The place of one document: the log's event, and which of its documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// Index of the event in the log.
    pub event: usize,
    /// Which of its documents: a finish has the finish chunk and, if asked for, the usage chunk.
    pub document: usize,
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.event, self.document)
    }
}

impl FromStr for Cursor {
    type Err = ();

    /// Takes exactly what [`fmt::Display`] writes: no signs, spaces or leading zeros.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (event, document) = text.split_once('.').ok_or(())?;
        let cursor = Self { event: event.parse().map_err(drop)?, document: document.parse().map_err(drop)? };
        (cursor.to_string() == text).then_some(cursor).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_written_is_read() {
        for cursor in [Cursor { event: 0, document: 0 }, Cursor { event: 4096, document: 1 }] {
            assert_eq!(cursor.to_string().parse(), Ok(cursor));
        }
        for garbage in
            ["", ".", "1", "1.", ".1", "1.2.3", "01.0", "1.00", "+1.0", "-1.0", " 1.0", "1.0 ", "1.x"]
        {
            assert_eq!(garbage.parse::<Cursor>(), Err(()), "{garbage:?}");
        }
        assert_eq!("99999999999999999999.0".parse::<Cursor>(), Err(()));
    }
}
