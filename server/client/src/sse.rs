//! Owns the reading of a server-sent event stream: bytes in any split become frames.
//!
//! Invariant: the frames depend on the bytes only, never on how the network cut them, and no frame (nor
//! what is kept of an unfinished one) outgrows the limit. It knows nothing of JSON, HTTP or chat.

use std::collections::VecDeque;

/// One thing read from the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A dispatched event. One without a `data` field is never dispatched, as the standard says.
    Event {
        /// The last `id` seen so far, in this event or an earlier one: what `Last-Event-ID` would send.
        id: Option<String>,
        /// The `event` field of this event.
        event: Option<String>,
        /// The `data` lines, joined by line feeds.
        data: String,
    },
    /// A line that began with a colon, without the colon and one space after it: a heartbeat.
    Comment(String),
}

/// An event (or one line) grew over the limit; the parser takes no more bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a server-sent event is longer than {max_event_bytes} bytes")]
pub struct EventTooLong {
    /// The limit that was passed.
    pub max_event_bytes: usize,
}

/// An incremental parser of `text/event-stream`.
#[derive(Debug)]
pub struct Parser {
    max_event_bytes: usize,
    line: Vec<u8>,
    /// The last byte was a CR that ended a line: a LF that follows belongs to it.
    after_cr: bool,
    at_first_line: bool,
    /// The id of the last finished event, and the one that the event being read would leave: an event cut
    /// off after its `id` line was not delivered, so a request that resumes must not skip it.
    id: Option<String>,
    next_id: Option<String>,
    event: Option<String>,
    data: Option<String>,
    too_long: bool,
}

impl Parser {
    /// A parser that refuses an event whose fields, or whose current line, exceed `max_event_bytes`.
    pub fn new(max_event_bytes: usize) -> Self {
        Self {
            max_event_bytes,
            line: Vec::new(),
            after_cr: false,
            at_first_line: true,
            id: None,
            next_id: None,
            event: None,
            data: None,
            too_long: false,
        }
    }

    /// Reads `bytes` and appends each finished frame to `frames`, those before an error included.
    pub fn push(&mut self, mut bytes: &[u8], frames: &mut VecDeque<Frame>) -> Result<(), EventTooLong> {
        if self.too_long {
            return Err(self.refuse());
        }
        if self.after_cr && !bytes.is_empty() {
            self.after_cr = false;
            if bytes[0] == b'\n' {
                bytes = &bytes[1..];
            }
        }
        while let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            self.keep(&bytes[..end])?;
            let cr = bytes[end] == b'\r';
            bytes = &bytes[end + 1..];
            match bytes.first() {
                Some(b'\n') if cr => bytes = &bytes[1..],
                None => self.after_cr = cr,
                _ => {}
            }
            self.end_line(frames);
        }
        self.keep(bytes)
    }

    /// Whether an event was begun and not ended by a blank line; such an event is lost when the stream ends.
    pub fn has_partial_event(&self) -> bool {
        !self.line.is_empty() || self.data.is_some() || self.event.is_some()
    }

    /// The id of the last finished event, for a request that resumes.
    pub fn last_event_id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    fn keep(&mut self, part: &[u8]) -> Result<(), EventTooLong> {
        let held = self.line.len() + self.data.as_ref().map_or(0, String::len);
        if held + part.len() > self.max_event_bytes {
            return Err(self.refuse());
        }
        self.line.extend_from_slice(part);
        Ok(())
    }

    fn refuse(&mut self) -> EventTooLong {
        self.too_long = true;
        self.line = Vec::new();
        self.data = None;
        EventTooLong { max_event_bytes: self.max_event_bytes }
    }

    fn end_line(&mut self, frames: &mut VecDeque<Frame>) {
        let mut bytes = self.line.as_slice();
        if std::mem::take(&mut self.at_first_line) {
            bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
        }
        let line = String::from_utf8_lossy(bytes);
        if line.is_empty() {
            self.id.clone_from(&self.next_id);
            let event = self.event.take();
            if let Some(data) = self.data.take() {
                frames.push_back(Frame::Event { id: self.id.clone(), event, data });
            }
        } else if let Some(comment) = line.strip_prefix(':') {
            frames.push_back(Frame::Comment(comment.strip_prefix(' ').unwrap_or(comment).to_owned()));
        } else {
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "data" => match &mut self.data {
                    Some(data) => {
                        data.push('\n');
                        data.push_str(value);
                    }
                    None => self.data = Some(value.to_owned()),
                },
                "event" => self.event = (!value.is_empty()).then(|| value.to_owned()),
                "id" if !value.contains('\0') => self.next_id = Some(value.to_owned()),
                // `retry` asks a browser to wait before it reconnects; this client never does by itself.
                _ => {}
            }
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(parts: &[&[u8]]) -> Vec<Frame> {
        let mut parser = Parser::new(1 << 20);
        let mut frames = VecDeque::new();
        for part in parts {
            parser.push(part, &mut frames).expect("within the limit");
        }
        frames.into()
    }

    fn event(id: Option<&str>, event: Option<&str>, data: &str) -> Frame {
        Frame::Event { id: id.map(str::to_owned), event: event.map(str::to_owned), data: data.to_owned() }
    }

    const MIXED: &str = "\u{feff}: hello\r\n\r\nid: 7\revent:token\rdata: 你好\r\rdata\n\ndata:a\r\ndata: b\r\n\
        retry: 5\r\nunknown\r\n\r\nevent: lost\n\n:\n:  two\ndata: [DONE]\n\n";

    fn mixed_frames() -> Vec<Frame> {
        vec![
            Frame::Comment("hello".into()),
            event(Some("7"), Some("token"), "你好"),
            event(Some("7"), None, ""),
            event(Some("7"), None, "a\nb"),
            Frame::Comment(String::new()),
            Frame::Comment(" two".into()),
            event(Some("7"), None, "[DONE]"),
        ]
    }

    #[test]
    fn every_split_in_two_and_byte_by_byte_reads_the_same() {
        let bytes = MIXED.as_bytes();
        for cut in 0..=bytes.len() {
            assert_eq!(parse(&[&bytes[..cut], &[], &bytes[cut..]]), mixed_frames(), "cut at {cut}");
        }
        assert_eq!(parse(&bytes.chunks(1).collect::<Vec<_>>()), mixed_frames());
    }

    #[test]
    fn each_line_ending_reads_the_same() {
        let lf = "data: a\ndata: b\n\n: c\ndata: d\n\n";
        let expected = parse(&[lf.as_bytes()]);
        assert_eq!(expected.len(), 3);
        for ending in ["\r", "\r\n"] {
            assert_eq!(parse(&[lf.replace('\n', ending).as_bytes()]), expected, "{ending:?}");
        }
    }

    #[test]
    fn an_unfinished_event_is_known_and_never_dispatched() {
        let mut parser = Parser::new(100);
        let mut frames = VecDeque::new();
        for (bytes, partial) in [("data: a", true), ("\n", true), ("\n", false), ("event: x\n", true)] {
            parser.push(bytes.as_bytes(), &mut frames).expect("short");
            assert_eq!(parser.has_partial_event(), partial, "{bytes:?}");
        }
        assert_eq!(frames, [event(None, None, "a")]);
        parser.push(b"\n\nid: 1\n\nid: 2\ndata: cut", &mut frames).expect("short");
        assert_eq!(parser.last_event_id(), Some("1"), "what was cut off was not delivered");
    }

    #[test]
    fn an_event_over_the_limit_is_refused_for_good() {
        for bytes in ["data: 0123456789", "data: 01234\ndata: 56", ": 01234567890123"] {
            let mut parser = Parser::new(12);
            let mut frames = VecDeque::new();
            parser.push(b"data: ok\n\n", &mut frames).expect("within the limit");
            assert_eq!(
                parser.push(bytes.as_bytes(), &mut frames),
                Err(EventTooLong { max_event_bytes: 12 }),
                "{bytes:?}"
            );
            assert!(parser.push(b"\n\ndata: x\n\n", &mut frames).is_err(), "it stays refused");
            assert_eq!(frames, [event(None, None, "ok")], "frames before the error are kept");
        }
    }

    #[test]
    fn an_id_with_a_nul_is_ignored_and_bad_utf8_is_replaced() {
        assert_eq!(parse(&[b"id: 1\nid: a\0b\ndata: \xff!\n\n"]), [event(Some("1"), None, "\u{fffd}!")]);
    }

    /// Text rich in what the grammar cares about.
    fn stream_text() -> impl Strategy<Value = String> {
        prop::collection::vec(
            prop::sample::select(vec![
                "data",
                "id",
                "event",
                ":",
                " ",
                "\n",
                "\r",
                "\r\n",
                "\n\n",
                "a",
                "你",
                "\0",
                "\u{feff}",
                "data: x\n",
                ": beat\n",
            ]),
            0..60,
        )
        .prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn any_split_reads_the_same(text in stream_text(), cuts in prop::collection::vec(0usize..400, 0..12)) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let parts: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(parse(&parts), parse(&[bytes]));
        }

        #[test]
        fn any_bytes_never_panic_and_stay_bounded(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut parser = Parser::new(32);
            let mut frames = VecDeque::new();
            for part in bytes.chunks(7) {
                if parser.push(part, &mut frames).is_err() {
                    break;
                }
                prop_assert!(parser.line.len() <= 32);
            }
        }
    }
}
