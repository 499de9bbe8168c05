//! Owns one streamed answer: bytes come in, typed events go out.
//!
//! Invariant: a stream ends in exactly one of three ways: after `Done`, after an `Error` event, or with a
//! [`ClientError`]. A connection that merely closes is [`ClientError::Truncated`], never a success.

use std::collections::VecDeque;
use std::time::Duration;

use crate::chat::{StreamEvent, read_event};
use crate::config::{ClientConfig, within};
use crate::error::ClientError;
use crate::sse::{Frame, Parser};

/// After `[DONE]` the rest of the body is awaited this long, so that the connection can be used again.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Open,
    /// An error event was read; the server may or may not still send `[DONE]`.
    Told,
    /// `[DONE]` was read; the body's end was not.
    Done,
    /// Nothing more is read.
    Closed,
}

/// A streamed answer. Dropping it closes the connection, which tells the server to abort.
#[derive(Debug)]
pub struct ChatStream {
    response: reqwest::Response,
    parser: Parser,
    idle_timeout: Duration,
    frames: VecDeque<Frame>,
    events: VecDeque<StreamEvent>,
    last_event_id: Option<String>,
    end: End,
}

impl ChatStream {
    pub(crate) fn new(response: reqwest::Response, config: &ClientConfig) -> Self {
        Self {
            response,
            parser: Parser::new(config.max_event_bytes),
            idle_timeout: config.idle_timeout,
            frames: VecDeque::new(),
            events: VecDeque::new(),
            last_event_id: None,
            end: End::Open,
        }
    }

    /// The next event; `None` once the stream has ended, and after an error.
    pub async fn next(&mut self) -> Option<Result<StreamEvent, ClientError>> {
        let result = self.advance().await;
        if result.is_err() {
            self.end = End::Closed;
        }
        result.transpose()
    }

    /// The id of the last event that was handed out, for a request that resumes: what came after it and was
    /// not handed out is not skipped.
    pub fn last_event_id(&self) -> Option<&str> {
        self.last_event_id.as_deref()
    }

    /// A header of the answer.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name).and_then(|value| value.to_str().ok())
    }

    async fn advance(&mut self) -> Result<Option<StreamEvent>, ClientError> {
        loop {
            if self.end == End::Closed {
                return Ok(None);
            }
            if let Some(event) = self.events.pop_front() {
                match event {
                    StreamEvent::Done => self.end = End::Done,
                    StreamEvent::Error(_) => self.end = End::Told,
                    _ => {}
                }
                return Ok(Some(event));
            }
            if self.end == End::Done {
                self.drain().await;
                continue;
            }
            match self.frames.pop_front() {
                Some(Frame::Comment(comment)) => return Ok(Some(StreamEvent::Comment(comment))),
                Some(Frame::Event { id, event, data }) => {
                    self.last_event_id = id;
                    read_event(event.as_deref(), &data, |event| self.events.push_back(event))
                        .map_err(|error| ClientError::malformed(&error, &data))?;
                }
                None => self.read().await?,
            }
        }
    }

    async fn read(&mut self) -> Result<(), ClientError> {
        match within(self.idle_timeout, self.response.chunk()).await {
            Ok(Some(bytes)) => Ok(self.parser.push(&bytes, &mut self.frames)?),
            // What was cut off after the error was told adds nothing to it.
            Ok(None) | Err(ClientError::Transport(_)) if self.end == End::Told => {
                self.end = End::Closed;
                Ok(())
            }
            Ok(None) => Err(ClientError::Truncated { broken: None }),
            Err(ClientError::Transport(broken)) => Err(ClientError::Truncated { broken: Some(broken) }),
            Err(error) => Err(error),
        }
    }

    /// Reads to the body's end, so that the connection can be used again; what comes late or is wrong here
    /// costs the connection, not the answer.
    async fn drain(&mut self) {
        self.end = End::Closed;
        let rest = async { while matches!(self.response.chunk().await, Ok(Some(_))) {} };
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, rest).await;
    }
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::{ApiError, ChatRequest};
    use crate::client::Client;
    use crate::testing::{CannedServer, Reply};
    use serde_json::json;

    /// Everything that a stream gives, with the error in words.
    async fn read_all(reply: Reply) -> Vec<Result<StreamEvent, String>> {
        let server = CannedServer::start(move |_, _| reply.clone()).await;
        let mut config = ClientConfig::new(&server.base_url);
        config.idle_timeout = Duration::from_millis(300);
        let client = Client::new(config).expect("a client");
        let mut stream = client.chat(&ChatRequest::default()).await.expect("a stream");
        let mut events = Vec::new();
        while let Some(event) = stream.next().await {
            events.push(event.map_err(|error| error.to_string()));
        }
        assert!(stream.next().await.is_none(), "an ended stream stays ended");
        events
    }

    fn delta(text: &str) -> String {
        format!("data: {}\n\n", json!({"choices": [{"delta": {"content": text}}]}))
    }

    #[tokio::test]
    async fn a_whole_stream_is_typed_events_up_to_done() {
        let text = format!(": wait\n\nid: 4\n{}{}data: [DONE]\n\ndata: late\n\n", delta("a"), delta("你"));
        // Cut inside a character, so that the bytes come in two reads.
        let cut = text.find('你').expect("it is there") + 1;
        let reply = Reply::sse().part(&text.as_bytes()[..cut]).pause_ms(5).part(&text.as_bytes()[cut..]);
        assert_eq!(
            read_all(reply).await,
            [
                Ok(StreamEvent::Comment("wait".into())),
                Ok(StreamEvent::Delta("a".into())),
                Ok(StreamEvent::Delta("你".into())),
                Ok(StreamEvent::Done),
            ]
        );
    }

    #[tokio::test]
    async fn an_end_without_done_is_truncated() {
        let expected = [Ok(StreamEvent::Delta("a".into())), Err("the stream ended without [DONE]".into())];
        assert_eq!(read_all(Reply::sse().part(delta("a").as_bytes())).await, expected);
        assert_eq!(
            read_all(Reply::sse().part(delta("a").as_bytes()).part(b"data: [DONE]\n")).await,
            expected
        );
        // A chunked body that stops before its last chunk: the connection broke.
        let broken = Reply::chunked_sse().part(b"5\r\n: x\n\n\r\n");
        let events = read_all(broken).await;
        assert_eq!(events[0], Ok(StreamEvent::Comment("x".into())));
        let words = events[1].as_ref().expect_err("truncated");
        assert!(words.starts_with("the stream ended without [DONE]: "), "{words}");
    }

    #[tokio::test]
    async fn an_error_in_mid_stream_is_told_once_with_or_without_done() {
        let error = b"data: {\"error\":{\"message\":\"out of blocks\"}}\n\n";
        let told = ApiError { message: "out of blocks".into(), ..ApiError::default() };
        let cut = read_all(Reply::sse().part(error)).await;
        assert_eq!(cut, [Ok(StreamEvent::Error(told.clone()))]);
        let done = read_all(Reply::sse().part(error).part(b"data: [DONE]\n\n")).await;
        assert_eq!(done, [Ok(StreamEvent::Error(told)), Ok(StreamEvent::Done)]);
    }

    #[tokio::test]
    async fn silence_bad_data_and_long_events_end_the_stream() {
        for (reply, words) in [
            (Reply::sse().pause_ms(2_000), "the server was silent for 300ms"),
            (Reply::sse().part(b"data: {nonsense\n\n"), "an event that cannot be read: "),
            (Reply::sse().part(&[b'x'; (1 << 20) + 1]), "a server-sent event is longer than 1048576 bytes"),
        ] {
            let events = read_all(reply).await;
            assert_eq!(events.len(), 1, "{events:?}");
            let error = events[0].as_ref().expect_err("an error");
            assert!(error.starts_with(words), "{error}");
        }
    }
}
