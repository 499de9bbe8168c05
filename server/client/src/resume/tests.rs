//! Breaks at every byte, refusals, seals, and stops, against servers that answer with canned bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::*;
use crate::config::ClientConfig;
use crate::testing::{CannedServer, Reply};

const SHA256_OF_HELLO: &str = "49f245684c29ec8fa855351c71aab757a52a39833e6834d6b85e0667783a61a3";

/// The events of one answer, each under its number, and `[DONE]`.
fn events(sha256: &str) -> Vec<String> {
    let finish = format!(
        r#"{{"choices":[{{"delta":{{}},"finish_reason":"stop"}}],"glm":{{"completion_tokens":3,"text_sha256":"{sha256}"}}}}"#
    );
    let usage = r#"{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":3}}"#;
    let role = r#"{"choices":[{"delta":{"role":"assistant"}}]}"#;
    let deltas = ["he", "ll", "o你"].map(|t| format!(r#"{{"choices":[{{"delta":{{"content":"{t}"}}}}]}}"#));
    let mut data = vec![role.to_owned()];
    data.extend(deltas);
    data.extend([finish, usage.to_owned()]);
    let mut events: Vec<String> =
        data.iter().enumerate().map(|(id, data)| format!("id: {id}\ndata: {data}\n\n")).collect();
    events.push("data: [DONE]\n\n".to_owned());
    events
}

/// What a server with these events answers to a request with this head.
fn rest(events: &[String], head: &str) -> Vec<u8> {
    let last =
        head.to_lowercase().lines().find_map(|line| line.strip_prefix("last-event-id: ")?.parse().ok());
    events[last.map_or(0, |last: usize| last + 1)..].concat().into_bytes()
}

fn named_sse() -> Reply {
    Reply::sse_of("s1")
}

async fn open(server: &CannedServer) -> Result<ResumingStream, ClientError> {
    let mut config = ClientConfig::new(&server.base_url);
    config.idle_timeout = Duration::from_millis(100);
    let policy = RetryPolicy {
        max_tries: 3,
        base_backoff: Duration::from_millis(2),
        max_retry_after: Duration::from_secs(2),
        ..RetryPolicy::default()
    };
    Client::new(config).expect("a client").chat_resuming(&ChatRequest::default(), policy).await
}

/// The text, and how the stream ended.
async fn read(server: &CannedServer) -> (String, Result<(Verified, u32), String>) {
    let mut text = String::new();
    let mut stream = match open(server).await {
        Ok(stream) => stream,
        Err(error) => return (text, Err(error.to_string())),
    };
    while let Some(event) = stream.next().await {
        match event {
            Ok(StreamEvent::Delta(delta)) => text += &delta,
            Ok(StreamEvent::Error(error)) => return (text, Err(error.to_string())),
            Ok(_) => {}
            Err(error) => {
                assert_eq!(stream.verified(), None);
                return (text, Err(error.to_string()));
            }
        }
    }
    let verified = stream.verified().expect("it ended in good order");
    (text, Ok((verified, stream.num_resumes())))
}

#[tokio::test]
async fn a_cut_at_any_byte_loses_nothing_and_doubles_nothing() {
    let events = events(SHA256_OF_HELLO);
    for cut in 0..events.concat().len() {
        let (events, requests) = (events.clone(), AtomicU32::new(0));
        let server = CannedServer::start(move |head, _| {
            let rest = rest(&events, head);
            if requests.fetch_add(1, Ordering::Relaxed) == 0 {
                assert!(head.starts_with("POST ") && head.contains("\r\nidempotency-key: "), "{head}");
                return named_sse().part(&rest[..cut]);
            }
            let resumed = head.starts_with("GET /v1/streams/s1 ");
            assert_eq!(resumed, head.contains("last-event-id"), "{head}");
            named_sse().part(&rest)
        })
        .await;
        assert_eq!(read(&server).await, ("hello你".into(), Ok((Verified::Yes, 1))), "cut at {cut}");
    }
}

#[tokio::test]
async fn silence_is_a_break_and_a_server_that_only_breaks_is_given_up() {
    let events = events(SHA256_OF_HELLO);
    let server = CannedServer::start(move |head, _| match head.contains("last-event-id") {
        false => named_sse().part(events[..2].concat().as_bytes()).pause_ms(5_000),
        true => named_sse().part(b": waiting\n\n"),
    })
    .await;
    let (text, error) = read(&server).await;
    assert_eq!(text, "he");
    assert_eq!(error, Err("gave up after 3 tries: the stream ended without [DONE]".into()));
}

#[tokio::test]
async fn an_answer_that_is_not_what_was_sealed_is_never_whole() {
    for (events, words) in [
        (events(&"0".repeat(64)), "the answer is not what the server says it sent: text_sha256: "),
        (events(""), "the answer is not what the server says it sent: text_sha256: "),
        (vec!["id: 0\ndata: {}\n\n".into(), "data: [DONE]\n\n".into()], "the stream ended without its hash"),
    ] {
        let server = CannedServer::start(move |head, _| named_sse().part(&rest(&events, head))).await;
        let error = read(&server).await.1.expect_err("not whole");
        assert!(error.starts_with(words), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_cannot_resume_is_asked_once() {
    for (num_events, expected) in
        [(6, Err("the stream ended without [DONE]".into())), (7, Ok((Verified::No, 0)))]
    {
        let requests = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&requests);
        let mut events = events("");
        events[4] = "data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n\n".into();
        let server = CannedServer::start(move |_, _| {
            count.fetch_add(1, Ordering::Relaxed);
            Reply::sse().part(events[..num_events].concat().as_bytes())
        })
        .await;
        assert_eq!(read(&server).await, ("hello你".into(), expected));
        assert_eq!(requests.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test]
async fn refusals_that_pass_are_waited_out_under_the_same_key() {
    let requests = AtomicU32::new(0);
    let events = events(SHA256_OF_HELLO);
    let keys = std::sync::Mutex::new(std::collections::HashSet::new());
    let server = CannedServer::start(move |head, _| {
        let key = head.lines().find(|line| line.starts_with("idempotency-key: ")).expect("a key");
        keys.lock().expect("no panic").insert(key.to_owned());
        assert_eq!(keys.lock().expect("no panic").len(), 1);
        match requests.fetch_add(1, Ordering::Relaxed) {
            0 => Reply::status("429 Too Many Requests\r\nRetry-After: 0").part(b"{}"),
            1 => Reply::status("503 Oops").part(b"{}"),
            _ => named_sse().part(&rest(&events, head)),
        }
    })
    .await;
    assert_eq!(read(&server).await.1, Ok((Verified::Yes, 0)));
    let server = CannedServer::start(|_, _| {
        Reply::status("409 Conflict").part(br#"{"error":{"message":"another model"}}"#)
    })
    .await;
    assert_eq!(read(&server).await.1, Err("HTTP 409: another model".into()));
}

#[tokio::test]
async fn another_stream_is_not_joined_and_abort_names_the_stream() {
    let events = events(SHA256_OF_HELLO);
    let aborts = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&aborts);
    let server = CannedServer::start(move |head, _| {
        if head.starts_with("DELETE /v1/streams/s1 ") {
            count.fetch_add(1, Ordering::Relaxed);
            return Reply::status("404 Not Found").part(b"{}");
        }
        match head.contains("last-event-id") {
            false => named_sse().part(events[..2].concat().as_bytes()),
            true => Reply::sse().part(events[2..].concat().as_bytes()),
        }
    })
    .await;
    assert_eq!(read(&server).await, ("he".into(), Err("the stream went on as another: None".into())));
    open(&server).await.expect("a stream").abort().await.expect("gone is as good as stopped");
    assert_eq!(aborts.load(Ordering::Relaxed), 1);
}

/// What a client that is stopped before its answer begins asks the server, which says `statuses` to that.
async fn requests_of_a_stop(statuses: &'static [&'static str]) -> (Vec<String>, Result<(), String>) {
    let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (log, has_post) = (Arc::clone(&asked), Arc::new(tokio::sync::Notify::new()));
    let posted = Arc::clone(&has_post);
    let server = CannedServer::start(move |head, _| {
        let key = head.lines().find_map(|line| line.strip_prefix("idempotency-key: ")).expect("a key");
        let mut log = log.lock().expect("no panic");
        log.push(format!("{} {key}", head.split(" HTTP").next().unwrap_or_default()));
        match head.starts_with("POST ") {
            true => {
                posted.notify_one();
                Reply::silence_ms(20_000)
            }
            false => Reply::status(statuses[log.len() - 2]).part(b"{}"),
        }
    })
    .await;
    let client = Client::new(ClientConfig::new(&server.base_url)).expect("a client");
    let mut stream = client.resuming(&ChatRequest::default(), RetryPolicy::default());
    let key = stream.idempotency_key.clone();
    tokio::select! {
        opened = stream.open() => panic!("{opened:?}"),
        () = has_post.notified() => {}
    }
    let result = stream.abort().await.map_err(|error| error.to_string());
    let asked = asked.lock().expect("no panic").clone();
    (asked.into_iter().map(|asked| asked.replace(&key, "KEY")).collect(), result)
}

#[tokio::test]
async fn a_request_that_is_stopped_before_its_answer_is_stopped_by_its_key() {
    let post = "POST /v1/chat/completions KEY".to_owned();
    let delete = "DELETE /v1/streams KEY".to_owned();
    for (statuses, num_deletes, expected) in [
        (&["204 No Content"][..], 1, Ok(())),
        (&["404 Not Found", "204 No Content"], 2, Ok(())),
        (&["404 Not Found", "404 Not Found"], 2, Ok(())),
        (&["405 Method Not Allowed"], 1, Ok(())),
        (&["401 Unauthorized"], 1, Err("HTTP 401: {}".to_owned())),
    ] {
        let mut requests = vec![post.clone()];
        requests.extend(vec![delete.clone(); num_deletes]);
        assert_eq!(requests_of_a_stop(statuses).await, (requests, expected));
    }
}

#[tokio::test]
async fn what_was_never_sent_or_was_refused_is_not_stopped() {
    let server = CannedServer::start(|head, _| {
        assert!(head.starts_with("POST "), "{head}");
        Reply::status("400 Bad Request").part(b"{}")
    })
    .await;
    let client = Client::new(ClientConfig::new(&server.base_url)).expect("a client");
    client.resuming(&ChatRequest::default(), RetryPolicy::default()).abort().await.expect("nothing to do");
    let mut stream = client.resuming(&ChatRequest::default(), RetryPolicy::default());
    stream.open().await.expect_err("a refusal");
    stream.abort().await.expect("nothing to do");
}
