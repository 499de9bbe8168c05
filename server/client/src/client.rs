//! Owns the HTTP side: a request goes out, typed events come in.
//!
//! Invariant: a stream ends in exactly one of three ways: after `Done`, after an `Error` event, or with a
//! [`ClientError`]. A connection that merely closes is [`ClientError::Truncated`], never a success.

use std::collections::VecDeque;
use std::time::Duration;

use reqwest::header::{ACCEPT, CONTENT_TYPE, RETRY_AFTER};
use serde::Serialize;
use serde_json::{Value, json};

use crate::chat::{ApiError, ChatRequest, StreamEvent, read_event};
use crate::error::ClientError;
use crate::sse::{Frame, Parser};

/// An answer that is not a stream (an error, a list of models) is read up to here.
const MAX_BODY_BYTES: usize = 4 << 20;
/// After `[DONE]` the rest of the body is awaited this long, so that the connection can be used again.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

/// Where the server is, and how long to wait for it.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// The server's address, without `/v1`: `http://127.0.0.1:8000`.
    pub base_url: String,
    /// Sent as a bearer token.
    pub api_key: Option<String>,
    /// The longest wait for a connection.
    pub connect_timeout: Duration,
    /// The longest silence, before the headers and between two reads; heartbeats count as a sign of life.
    pub idle_timeout: Duration,
    /// The largest event that is read.
    pub max_event_bytes: usize,
}

impl ClientConfig {
    /// The defaults for the server at `base_url`.
    pub fn new(base_url: impl Into<String>) -> Self {
        Self {
            base_url: base_url.into(),
            api_key: None,
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(120),
            max_event_bytes: 1 << 20,
        }
    }
}

/// A client of one server; cheap to clone, and clones share their connections.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    config: ClientConfig,
}

impl Client {
    /// A client with `config`. It goes to the server itself, never by a proxy from the environment: a proxy
    /// that buffers would change what is measured. HTTPS is not built in.
    pub fn new(mut config: ClientConfig) -> Result<Self, ClientError> {
        config
            .base_url
            .truncate(config.base_url.trim_end_matches('/').len());
        let http = reqwest::Client::builder()
            .connect_timeout(config.connect_timeout)
            .tcp_nodelay(true)
            .no_proxy()
            .build()
            .map_err(ClientError::Transport)?;
        Ok(Self { http, config })
    }

    /// Starts a streamed chat; usage is always asked for.
    pub async fn chat(&self, request: &ChatRequest) -> Result<ChatStream, ClientError> {
        #[derive(Serialize)]
        struct Streamed<'a> {
            #[serde(flatten)]
            request: &'a ChatRequest,
            stream: bool,
            stream_options: Value,
        }
        let stream_options = json!({"include_usage": true});
        self.stream(&Streamed {
            request,
            stream: true,
            stream_options,
        })
        .await
    }

    /// Posts any JSON to the chat endpoint and reads the answer as a stream, which `body` has to ask for.
    pub async fn stream<B: Serialize + ?Sized>(&self, body: &B) -> Result<ChatStream, ClientError> {
        let request = self.http.post(self.url("/v1/chat/completions")).json(body);
        let response = self.send(request.header(ACCEPT, "text/event-stream")).await?;
        let content_type = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok());
        let content_type = content_type.unwrap_or_default();
        if !content_type.starts_with("text/event-stream") {
            return Err(ClientError::NotAStream(content_type.to_owned()));
        }
        Ok(ChatStream {
            response,
            parser: Parser::new(self.config.max_event_bytes),
            idle_timeout: self.config.idle_timeout,
            frames: VecDeque::new(),
            events: VecDeque::new(),
            end: End::Open,
        })
    }

    /// The names of the models that the server lists.
    pub async fn models(&self) -> Result<Vec<String>, ClientError> {
        let body = self.get(&self.url("/v1/models")).await?;
        let list: Value =
            serde_json::from_str(&body).map_err(|error| ClientError::malformed(&error, &body))?;
        let models = list["data"].as_array().map_or(&[][..], Vec::as_slice);
        Ok(models
            .iter()
            .filter_map(|model| model["id"].as_str().map(str::to_owned))
            .collect())
    }

    /// The body of any address of the server, such as `/metrics`; `url` is whole.
    pub async fn get(&self, url: &str) -> Result<String, ClientError> {
        let response = self.send(self.http.get(url)).await?;
        self.body(response).await
    }

    /// `path` on this server.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.config.base_url)
    }

    async fn send(&self, mut request: reqwest::RequestBuilder) -> Result<reqwest::Response, ClientError> {
        if let Some(key) = &self.config.api_key {
            request = request.bearer_auth(key);
        }
        let response = within(self.config.idle_timeout, request.send()).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let retry_after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok());
        let retry_after_s = retry_after.and_then(|value| value.trim().parse().ok());
        let body = self.body(response).await?;
        Err(ClientError::Status {
            status: status.as_u16(),
            error: ApiError::parse(&body),
            retry_after_s,
            body,
        })
    }

    async fn body(&self, mut response: reqwest::Response) -> Result<String, ClientError> {
        let mut body = Vec::new();
        while let Some(bytes) = within(self.config.idle_timeout, response.chunk()).await? {
            if body.len() + bytes.len() > MAX_BODY_BYTES {
                return Err(ClientError::BodyTooLong(MAX_BODY_BYTES));
            }
            body.extend_from_slice(&bytes);
        }
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}

async fn within<T>(
    idle_timeout: Duration,
    work: impl Future<Output = Result<T, reqwest::Error>>,
) -> Result<T, ClientError> {
    match tokio::time::timeout(idle_timeout, work).await {
        Ok(result) => result.map_err(ClientError::Transport),
        Err(_) => Err(ClientError::Idle(idle_timeout)),
    }
}

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
    end: End,
}

impl ChatStream {
    /// The next event; `None` once the stream has ended, and after an error.
    pub async fn next(&mut self) -> Option<Result<StreamEvent, ClientError>> {
        let result = self.advance().await;
        if result.is_err() {
            self.end = End::Closed;
        }
        result.transpose()
    }

    /// The id of the last event that came whole, for a request that resumes.
    pub fn last_event_id(&self) -> Option<&str> {
        self.parser.last_event_id()
    }

    /// A header of the answer.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.response
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
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
                Some(Frame::Event { event, data, .. }) => {
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
    use crate::testing::{CannedServer, Reply};

    async fn client(server: &CannedServer) -> Client {
        let mut config = ClientConfig::new(format!("{}/", server.base_url));
        config.api_key = Some("secret".into());
        config.idle_timeout = Duration::from_millis(300);
        Client::new(config).expect("a client")
    }

    /// Everything that a stream gives, with the error in words.
    async fn read_all(reply: Reply) -> Vec<Result<StreamEvent, String>> {
        let server = CannedServer::start(move |_, _| reply.clone()).await;
        let mut stream = client(&server)
            .await
            .chat(&ChatRequest::default())
            .await
            .expect("a stream");
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
        let text = format!(
            ": wait\n\nid: 4\n{}{}data: [DONE]\n\ndata: late\n\n",
            delta("a"),
            delta("你")
        );
        // Cut inside a character, so that the bytes come in two reads.
        let cut = text.find('你').expect("it is there") + 1;
        let reply = Reply::sse()
            .part(&text.as_bytes()[..cut])
            .pause_ms(5)
            .part(&text.as_bytes()[cut..]);
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
    async fn the_request_asks_for_a_stream_with_usage_and_carries_the_key() {
        let server = CannedServer::start(|head, body| {
            assert!(
                head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"),
                "{head}"
            );
            assert!(
                head.to_lowercase()
                    .contains("\r\nauthorization: bearer secret\r\n"),
                "{head}"
            );
            let body: Value = serde_json::from_str(body).expect("JSON");
            assert_eq!(body["stream"], true);
            assert_eq!(body["stream_options"]["include_usage"], true);
            assert_eq!(body["top_k"], 5);
            Reply::sse().part(b"id: 9\ndata: [DONE]\n\n")
        })
        .await;
        let mut request = ChatRequest {
            model: "m".into(),
            ..ChatRequest::default()
        };
        request.extra.insert("top_k".into(), json!(5));
        let mut stream = client(&server).await.chat(&request).await.expect("a stream");
        assert!(matches!(stream.next().await, Some(Ok(StreamEvent::Done))));
        assert_eq!(stream.last_event_id(), Some("9"));
        assert_eq!(stream.header("Content-Type"), Some("text/event-stream"));
    }

    #[tokio::test]
    async fn an_end_without_done_is_truncated() {
        let expected = [
            Ok(StreamEvent::Delta("a".into())),
            Err("the stream ended without [DONE]".into()),
        ];
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
        let told = ApiError {
            message: "out of blocks".into(),
            ..ApiError::default()
        };
        let cut = read_all(Reply::sse().part(error)).await;
        assert_eq!(cut, [Ok(StreamEvent::Error(told.clone()))]);
        let done = read_all(Reply::sse().part(error).part(b"data: [DONE]\n\n")).await;
        assert_eq!(done, [Ok(StreamEvent::Error(told)), Ok(StreamEvent::Done)]);
    }

    #[tokio::test]
    async fn silence_bad_data_and_long_events_end_the_stream() {
        for (reply, words) in [
            (Reply::sse().pause_ms(2_000), "the server was silent for 300ms"),
            (
                Reply::sse().part(b"data: {nonsense\n\n"),
                "an event that cannot be read: ",
            ),
            (
                Reply::sse().part(&[b'x'; (1 << 20) + 1]),
                "a server-sent event is longer than 1048576 bytes",
            ),
        ] {
            let events = read_all(reply).await;
            assert_eq!(events.len(), 1, "{events:?}");
            let error = events[0].as_ref().expect_err("an error");
            assert!(error.starts_with(words), "{error}");
        }
    }

    #[tokio::test]
    async fn an_error_status_carries_the_openai_error_and_retry_after() {
        let server = CannedServer::start(|_, _| {
            Reply::status("429 Too Many Requests\r\nRetry-After: 7")
                .part(br#"{"error":{"message":"the queue is full","type":"overloaded","code":"queue_full"}}"#)
        })
        .await;
        let error = client(&server)
            .await
            .chat(&ChatRequest::default())
            .await
            .expect_err("a refusal");
        assert_eq!(error.to_string(), "HTTP 429: the queue is full");
        let ClientError::Status {
            status: 429,
            error: Some(error),
            retry_after_s: Some(7),
            ..
        } = error
        else {
            panic!("{error:?}")
        };
        assert_eq!(error.kind.as_deref(), Some("overloaded"));
    }

    #[tokio::test]
    async fn a_success_that_is_no_stream_and_a_dead_address_are_errors() {
        let server = CannedServer::start(|_, _| Reply::status("200 OK").part(b"{}")).await;
        let error = client(&server)
            .await
            .chat(&ChatRequest::default())
            .await
            .expect_err("no stream");
        assert!(
            matches!(&error, ClientError::NotAStream(kind) if kind == "application/json"),
            "{error:?}"
        );
        let dead = Client::new(ClientConfig::new("http://127.0.0.1:1")).expect("a client");
        let error = dead
            .chat(&ChatRequest::default())
            .await
            .expect_err("nobody listens");
        assert!(error.to_string().contains("refused"), "{error}");
    }

    #[tokio::test]
    async fn models_are_listed_by_name() {
        let server = CannedServer::start(|head, _| {
            assert!(head.starts_with("GET /v1/models "), "{head}");
            Reply::status("200 OK").part(br#"{"object":"list","data":[{"id":"chatglm3-6b"},{"id":"b"}]}"#)
        })
        .await;
        assert_eq!(
            client(&server).await.models().await.expect("a list"),
            ["chatglm3-6b", "b"]
        );
    }
}
