//! Owns the HTTP side: requests go out, and an answer is a stream, a body or a typed error.
//!
//! Invariants: every wait has an end: the connection, the headers, and each read; what a user tells the
//! server (the key, the chat) goes to the origin of its configured address and to no other, whatever
//! that server's redirects say.

use std::time::Duration;

use reqwest::Url;
use reqwest::header::{ACCEPT, CONTENT_TYPE, RETRY_AFTER};
use reqwest::redirect::{Attempt, Policy};
use serde::Serialize;
use serde_json::{Value, json};

use crate::chat::{ApiError, ChatRequest};
use crate::config::{ClientConfig, within};
use crate::error::ClientError;
use crate::stream::ChatStream;

/// An answer that is not a stream (an error, a list of models) is read up to here.
const MAX_BODY_BYTES: usize = 4 << 20;
/// More than any server needs that does not redirect in a circle.
const MAX_REDIRECTS: usize = 5;
/// A request that is cancelled is asked for this often: the server may not have read it yet when the
/// cancellation overtakes it.
const NUM_CANCEL_TRIES: usize = 2;
const CANCEL_PAUSE: Duration = Duration::from_millis(200);

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
        // Clients of OpenAI's API are used to giving the address with the version.
        let base_url = config.base_url.trim_end_matches('/');
        config.base_url.truncate(base_url.strip_suffix("/v1").unwrap_or(base_url).len());
        let http = reqwest::Client::builder()
            .connect_timeout(config.connect_timeout)
            .tcp_nodelay(true)
            // A connection that was idle may be closed by the server just as a request is sent on it, and
            // then nobody knows whether it was heard.
            .pool_max_idle_per_host(0)
            .redirect(Policy::custom(within_origin))
            .no_proxy()
            .build()
            .map_err(ClientError::Transport)?;
        Ok(Self { http, config })
    }

    /// Starts a streamed chat; usage is always asked for.
    pub async fn chat(&self, request: &ChatRequest) -> Result<ChatStream, ClientError> {
        self.open(self.post_chat(request)).await
    }

    /// The same under a key: a server that knows it never starts the same answer twice.
    pub(crate) async fn chat_with_key(
        &self,
        request: &ChatRequest,
        key: &str,
    ) -> Result<ChatStream, ClientError> {
        self.open(self.post_chat(request).header("Idempotency-Key", key)).await
    }

    /// The events of a stream that was started before, after the one with the id `last_event_id`.
    pub(crate) async fn resume_stream(
        &self,
        stream_id: &str,
        last_event_id: &str,
    ) -> Result<ChatStream, ClientError> {
        let request = self.http.get(self.url(&format!("/v1/streams/{stream_id}")));
        self.open(request.header("Last-Event-ID", last_event_id)).await
    }

    /// Tells the server to stop generating a stream; one that it does not know any more is no error.
    pub(crate) async fn abort_stream(&self, stream_id: &str) -> Result<(), ClientError> {
        match self.send(self.http.delete(self.url(&format!("/v1/streams/{stream_id}")))).await {
            Ok(_) | Err(ClientError::Status { status: 404 | 410, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Tells the server to stop the request of this key, of which no answer came that would name a stream.
    /// One that the server does not know (any more), and a server that knows no keys, are no error.
    pub(crate) async fn abort_key(&self, key: &str) -> Result<(), ClientError> {
        for number in 0..NUM_CANCEL_TRIES {
            if number > 0 {
                tokio::time::sleep(CANCEL_PAUSE).await;
            }
            let request = self.http.delete(self.url("/v1/streams")).header("Idempotency-Key", key);
            match self.send(request).await {
                Err(ClientError::Status { status: 404, .. }) => {}
                Ok(_) | Err(ClientError::Status { status: 405 | 410, .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn post_chat(&self, request: &ChatRequest) -> reqwest::RequestBuilder {
        #[derive(Serialize)]
        struct Streamed<'a> {
            #[serde(flatten)]
            request: &'a ChatRequest,
            stream: bool,
            stream_options: Value,
        }
        let stream_options = json!({"include_usage": true});
        let body = Streamed { request, stream: true, stream_options };
        self.http.post(self.url("/v1/chat/completions")).json(&body)
    }

    async fn open(&self, request: reqwest::RequestBuilder) -> Result<ChatStream, ClientError> {
        let response = self.send(request.header(ACCEPT, "text/event-stream")).await?;
        let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let content_type = content_type.unwrap_or_default();
        if !content_type.starts_with("text/event-stream") {
            return Err(ClientError::NotAStream(content_type.to_owned()));
        }
        Ok(ChatStream::new(response, &self.config))
    }

    /// The names of the models that the server lists.
    pub async fn models(&self) -> Result<Vec<String>, ClientError> {
        let body = self.get(&self.url("/v1/models")).await?;
        let list: Value =
            serde_json::from_str(&body).map_err(|error| ClientError::malformed(&error, &body))?;
        let models = list["data"].as_array().map_or(&[][..], Vec::as_slice);
        Ok(models.iter().filter_map(|model| model["id"].as_str().map(str::to_owned)).collect())
    }

    /// The body at `url`, such as the server's `/metrics`; the key goes to the origin of the server itself only.
    pub async fn get(&self, url: &str) -> Result<String, ClientError> {
        let request = self.http.get(url);
        let response = match self.is_own(url) {
            true => self.send(request).await?,
            false => self.send_without_key(request).await?,
        };
        self.body(response).await
    }

    /// Whether `url` has the scheme, host and port of this server.
    fn is_own(&self, url: &str) -> bool {
        let origin = |url: &str| Url::parse(url).ok().map(|url| url.origin());
        let own = origin(&self.config.base_url);
        // What cannot be read has no origin; an opaque one equals nothing, itself included.
        own.is_some() && origin(url) == own
    }

    /// `path` on this server.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.config.base_url)
    }

    async fn send(&self, mut request: reqwest::RequestBuilder) -> Result<reqwest::Response, ClientError> {
        if let Some(digest) = &self.config.model_digest {
            request = request.header("GLM-Model-Digest", digest);
        }
        if let Some(key) = &self.config.api_key {
            request = request.bearer_auth(key);
        }
        self.send_without_key(request).await
    }

    async fn send_without_key(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<reqwest::Response, ClientError> {
        let response = within(self.config.idle_timeout, request.send()).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let retry_after_s = retry_after.and_then(|value| value.trim().parse().ok());
        let body = self.body(response).await?;
        Err(ClientError::Status {
            status: status.as_u16(),
            error: ApiError::parse(&body).map(Box::new),
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

/// Follows a redirect unless it leads to another origin, which would get the chat.
fn within_origin(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let previous = attempt.previous();
    if previous.last().is_none_or(|from| from.origin() != attempt.url().origin()) {
        let message = format!("the server redirects to another origin, {}: use that address", attempt.url());
        return attempt.error(message);
    }
    match previous.len() > MAX_REDIRECTS {
        true => attempt.error("the server redirects in a circle"),
        false => attempt.follow(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::StreamEvent;
    use crate::testing::{CannedServer, Reply};

    async fn client(server: &CannedServer) -> Client {
        let mut config = ClientConfig::new(format!("{}/v1/", server.base_url));
        config.api_key = Some("secret".into());
        config.idle_timeout = Duration::from_millis(300);
        Client::new(config).expect("a client")
    }

    #[tokio::test]
    async fn the_request_asks_for_a_stream_with_usage_and_carries_the_key() {
        let server = CannedServer::start(|head, body| {
            assert!(head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"), "{head}");
            assert!(head.to_lowercase().contains("\r\nauthorization: bearer secret\r\n"), "{head}");
            let body: Value = serde_json::from_str(body).expect("JSON");
            assert_eq!(body["stream"], true);
            assert_eq!(body["stream_options"]["include_usage"], true);
            assert_eq!(body["top_k"], 5);
            Reply::sse().part(b"id: 9\ndata: [DONE]\n\n")
        })
        .await;
        let mut request = ChatRequest { model: "m".into(), ..ChatRequest::default() };
        request.extra.insert("top_k".into(), json!(5));
        let mut stream = client(&server).await.chat(&request).await.expect("a stream");
        assert!(matches!(stream.next().await, Some(Ok(StreamEvent::Done))));
        assert_eq!(stream.last_event_id(), Some("9"));
        assert_eq!(stream.header("Content-Type"), Some("text/event-stream"));
    }

    #[tokio::test]
    async fn an_error_status_carries_the_openai_error_and_retry_after() {
        let server = CannedServer::start(|_, _| {
            Reply::status("429 Too Many Requests\r\nRetry-After: 7")
                .part(br#"{"error":{"message":"the queue is full","type":"overloaded","code":"queue_full"}}"#)
        })
        .await;
        let error = client(&server).await.chat(&ChatRequest::default()).await.expect_err("a refusal");
        assert_eq!(error.to_string(), "HTTP 429: the queue is full");
        let ClientError::Status { status: 429, error: Some(error), retry_after_s: Some(7), .. } = error
        else {
            panic!("{error:?}")
        };
        assert_eq!(error.kind.as_deref(), Some("overloaded"));
    }

    #[tokio::test]
    async fn a_success_that_is_no_stream_and_a_dead_address_are_errors() {
        let server = CannedServer::start(|_, _| Reply::status("200 OK").part(b"{}")).await;
        let error = client(&server).await.chat(&ChatRequest::default()).await.expect_err("no stream");
        assert!(matches!(&error, ClientError::NotAStream(kind) if kind == "application/json"), "{error:?}");
        let dead = Client::new(ClientConfig::new("http://127.0.0.1:1")).expect("a client");
        let error = dead.chat(&ChatRequest::default()).await.expect_err("nobody listens");
        assert!(error.to_string().contains("refused"), "{error}");
    }

    #[test]
    fn the_key_goes_to_the_own_origin_only() {
        let is_own =
            |base: &str, url: &str| Client::new(ClientConfig::new(base)).expect("a client").is_own(url);
        for (base, url) in [
            ("http://host:8000", "http://host:8000/metrics"),
            ("http://host:8000/v1", "http://HOST:8000"),
            ("http://host", "http://host:80/x"),
            ("https://host/prefix", "https://host:443/metrics"),
            ("http://[::1]:8000", "http://[0:0:0:0:0:0:0:1]:8000/metrics"),
        ] {
            assert!(is_own(base, url), "{base} {url}");
        }
        for (base, url) in [
            ("http://host:8000", "http://host:8000.evil.com/metrics"),
            ("http://host:8000", "http://host:80001/metrics"),
            ("http://host:8000", "http://host:8000@evil.com/metrics"),
            ("http://host:8000", "http://host:9000/metrics"),
            ("http://host:8000", "https://host:8000/metrics"),
            ("http://host", "http://host.evil.com"),
            ("http://host", "http://hostile"),
            ("http://host", "/metrics"),
            ("host:8000", "host:8000"),
            ("nonsense", "nonsense"),
        ] {
            assert!(!is_own(base, url), "{base} {url}");
        }
    }

    #[tokio::test]
    async fn a_port_that_begins_like_the_own_one_gets_no_key() {
        let server = CannedServer::start(|head, _| {
            assert!(!head.to_lowercase().contains("authorization"), "{head}");
            Reply::status("200 OK").part(b"metrics")
        })
        .await;
        let base_url = server.base_url[..server.base_url.len() - 1].to_owned();
        let config = ClientConfig { api_key: Some("secret".into()), ..ClientConfig::new(base_url) };
        let body = Client::new(config).expect("a client").get(&format!("{}/metrics", server.base_url)).await;
        assert_eq!(body.expect("an answer"), "metrics");
    }

    #[tokio::test]
    async fn a_redirect_is_followed_to_the_own_origin_only() {
        let elsewhere = CannedServer::start(|head, _| panic!("not to be asked: {head}")).await;
        let target = format!("{}/v1/chat/completions", elsewhere.base_url);
        let server =
            CannedServer::start(move |head, _| match head.starts_with("POST /v1/chat/completions ") {
                true => Reply::status(&format!("307 Temporary Redirect\r\nLocation: {target}")).part(b""),
                false if head.starts_with("GET /v1/models ") => {
                    Reply::status("302 Found\r\nLocation: /other").part(b"")
                }
                false => {
                    assert!(head.to_lowercase().contains("authorization: bearer secret"), "{head}");
                    Reply::status("200 OK").part(br#"{"data":[{"id":"m"}]}"#)
                }
            })
            .await;
        let client = client(&server).await;
        assert_eq!(client.models().await.expect("a list"), ["m"]);
        let error = client.chat(&ChatRequest::default()).await.expect_err("not followed");
        assert!(error.to_string().contains("redirects to another origin, http://127.0.0.1"), "{error}");
    }

    #[tokio::test]
    async fn models_are_listed_by_name() {
        let server = CannedServer::start(|head, _| {
            assert!(head.starts_with("GET /v1/models "), "{head}");
            Reply::status("200 OK").part(br#"{"object":"list","data":[{"id":"chatglm3-6b"},{"id":"b"}]}"#)
        })
        .await;
        assert_eq!(client(&server).await.models().await.expect("a list"), ["chatglm3-6b", "b"]);
    }
}
