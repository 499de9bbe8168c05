//! `/v1/streams` beside reading: what a HEAD says, and how a reply is ended by its key.

use std::time::Duration;

use crate::support::events::Events;
use crate::support::{Options, Server, request, run, streaming, two_keys};
use glmserve_client::{ChatRequest, Client, ClientConfig, Message, RetryPolicy};
use serde_json::Value;

async fn error(response: reqwest::Response) -> (u16, String) {
    let status = response.status().as_u16();
    let body: Value = response.json().await.unwrap();
    (status, body["error"]["code"].as_str().unwrap().to_owned())
}

#[test]
fn a_reply_can_be_ended_by_its_key_before_any_answer_names_it() {
    run(async {
        let server = Server::start(Options { keys: Some(two_keys()), ..Options::default() }).await;
        let (a, b) = (("authorization", "Bearer a"), ("authorization", "Bearer b"));
        let key = ("idempotency-key", "k");
        let delete = async |headers: &[(&str, &str)]| {
            server.call("DELETE", "/v1/streams", headers, &Value::Null).await
        };
        let not_found = (404, "stream_not_found".to_owned());
        assert_eq!(error(delete(&[a]).await).await, (400, "invalid_header".into()));
        assert_eq!(error(delete(&[a, key]).await).await, not_found);
        let headers = [a, key];
        let body = request("slow 230");
        let end = async {
            server.until("glmserve_requests_running", 1).await;
            assert_eq!(error(delete(&[b, key]).await).await, not_found);
            assert_eq!(delete(&[a, key]).await.status(), 204);
        };
        let (answer, ()) = tokio::join!(server.chat(&headers, &body), end);
        assert_eq!(error(answer).await, (410, "aborted".into()));
        server.until("glmserve_requests_running", 0).await;
        assert_eq!(delete(&[a, key]).await.status(), 204, "an ended one stays ended");
    });
}

#[test]
fn our_client_stops_a_request_before_its_answer_begins() {
    run(async {
        let options = Options { status_hold: Duration::from_secs(20), ..Options::default() };
        let server = Server::start(options).await;
        let client = Client::new(ClientConfig::new(format!("http://{}", server.address))).unwrap();
        let messages = vec![Message::new("user", "pause 3000")];
        let request = ChatRequest { model: "test-model".into(), messages, ..ChatRequest::default() };
        let mut stream = client.resuming(&request, RetryPolicy::default());
        tokio::select! {
            opened = stream.open() => panic!("{opened:?}"),
            () = server.until("glmserve_requests_running", 1) => {}
        }
        stream.abort().await.unwrap();
        server.until("glmserve_streams_total{outcome=\"abort\"}", 1).await;
    });
}

#[test]
fn the_head_of_a_stream_is_that_of_its_answer_and_reads_nothing() {
    run(async {
        let options = Options { resume_grace: Duration::from_millis(400), ..Options::default() };
        let server = Server::start(options).await;
        let key = ("idempotency-key", "k");
        let mut events = Events::of(server.chat(&[key], &streaming("stall 3000")).await);
        let path = format!("/v1/streams/{}", events.stream_id());
        let last = events.next().await.unwrap().id;
        let head = async |headers: &[(&str, &str)]| server.call("HEAD", &path, headers, &Value::Null).await;
        let described = |response: &reqwest::Response| {
            let names =
                ["content-type", "cache-control", "glm-stream-id", "x-accel-buffering", "transfer-encoding"];
            let headers = names.map(|name| response.headers().get(name).cloned());
            (response.status(), headers)
        };
        for headers in [&[][..], &[("last-event-id", last.as_str())], &[("prefer", "wait=1")]] {
            let get = server.call("GET", &path, headers, &Value::Null).await;
            assert_eq!(described(&head(headers).await), described(&get));
            assert_eq!(
                get.headers().get("preference-applied"),
                head(headers).await.headers().get("preference-applied")
            );
        }
        let json = ("accept", "application/json");
        let plain = head(&[json]).await;
        assert_eq!(
            (plain.status().as_u16(), &plain.headers()["content-type"]),
            (200, &"application/json".parse().unwrap())
        );
        assert_eq!(plain.headers().get("content-length"), None, "nobody knows it yet");
        let pending = head(&[json, ("prefer", "respond-async")]).await;
        assert_eq!(
            (pending.status().as_u16(), pending.headers()["location"].to_str().unwrap()),
            (202, &*path)
        );
        for (headers, status) in [
            ([("last-event-id", "0123abcd.0.0")], 409),
            ([("last-event-id", "x")], 400),
            ([("glm-timeout", "x")], 400),
        ] {
            assert_eq!(head(&headers).await.status(), status);
        }
        assert_eq!(server.call("HEAD", "/v1/streams/x", &[], &Value::Null).await.status(), 404);
        let resumed = server.metric("glmserve_streams_resumed_total");
        drop(events);
        server.until("glmserve_streams_detached", 1).await;
        // Whoever looks neither stops the clock of the grace time nor keeps a promise alive.
        while server.metric("glmserve_streams_total{outcome=\"abort\"}") < 1.0 {
            let status = head(&[]).await.status();
            assert!(status == 200 || status == 410, "{status}");
            head(&[json, ("prefer", "respond-async")]).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(server.metric("glmserve_streams_resumed_total"), resumed);
        assert_eq!(head(&[json]).await.status(), 410, "as the answer itself");
    });
}
