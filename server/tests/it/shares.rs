//! What is kept for clients that come back is shared out: refused requests take nothing, nobody loses a reply to
//! another one who holds more, and promises are kept.

use std::time::Duration;

use crate::support::{Options, Server, request, run};
use glmserve::stream::memory_store::StoreLimits;
use serde_json::{Value, json};

/// A client of its own: it comes from 127.0.0.`number`.
fn client(number: u8) -> reqwest::Client {
    reqwest::Client::builder().local_address(Some([127, 0, 0, number].into())).build().unwrap()
}

async fn chat(
    http: &reqwest::Client,
    server: &Server,
    headers: &[(&str, &str)],
    body: &Value,
) -> reqwest::Response {
    let request = http.post(format!("http://{}/v1/chat/completions", server.address)).json(body);
    headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).send().await.unwrap()
}

async fn text(response: reqwest::Response) -> Value {
    response.json::<Value>().await.unwrap()["choices"][0]["message"]["content"].clone()
}

fn store(max_bytes: usize, max_detached: usize) -> Options {
    let store_limits = StoreLimits { retention: Duration::from_secs(600), max_bytes, max_detached };
    Options { store_limits, ..Options::default() }
}

#[test]
fn refused_requests_are_not_kept_and_leave_their_key_free() {
    run(async {
        let server =
            Server::start(Options { max_num_seqs: 1, max_num_waiting: 0, ..store(40_000, 16) }).await;
        let (http, key) = (client(1), ("idempotency-key", "first"));
        let kept = text(chat(&http, &server, &[key], &request("say first")).await).await;
        assert_eq!(kept, "first");
        let bytes = server.metric("glmserve_stream_store_bytes");
        let mut wrong = request("say hi");
        wrong["temperature"] = json!(99);
        for number in 0..50 {
            let key = ("idempotency-key", &*format!("wrong {number}"));
            assert_eq!(chat(&http, &server, &[key], &wrong).await.status(), 400);
        }
        // A corrected body under the same key is a new request.
        let corrected = chat(&http, &server, &[("idempotency-key", "wrong 0")], &request("say hi")).await;
        assert_eq!(text(corrected).await, "hi");
        // What finds no place is refused as well.
        let blocker = server.open(&request("slow 1900")).await;
        server.until("glmserve_requests_running", 1).await;
        for number in 0..20 {
            let key = ("idempotency-key", &*format!("busy {number}"));
            assert_eq!(chat(&http, &server, &[key], &request("say hi")).await.status(), 429);
        }
        drop(blocker);
        server.until("glmserve_requests_running", 0).await;
        assert!(server.metric("glmserve_stream_store_bytes") <= 2.0 * bytes, "two replies");
        let again = text(chat(&http, &server, &[key], &request("say first")).await).await;
        assert_eq!(again, "first");
        let busy = chat(&http, &server, &[("idempotency-key", "busy 0")], &request("say other")).await;
        assert_eq!(text(busy).await, "other");
    });
}

#[test]
fn nobody_loses_a_reply_to_a_client_that_holds_more() {
    run(async {
        let server = Server::start(store(40_000, 16)).await;
        let (quiet, flood) = (client(1), client(2));
        let key = [("idempotency-key", "quiet")];
        let first = chat(&quiet, &server, &key, &request("say mine")).await;
        let id = first.headers()["glm-stream-id"].to_str().unwrap().to_owned();
        for number in 0..60 {
            let key = [("idempotency-key", &*format!("flood {number}"))];
            assert_eq!(chat(&flood, &server, &key, &request("say abcdefgh")).await.status(), 200);
            assert!(server.metric("glmserve_stream_store_bytes") <= 40_000.0);
        }
        // The name of the stream still opens it, for whoever knows it: shares are not access rights.
        assert_eq!(text(server.get_stream(&id, &[("accept", "application/json")]).await).await, "mine");
        assert_eq!(server.metric("glmserve_streams_resumed_total"), 1.0);
        let oldest = chat(&flood, &server, &[("idempotency-key", "flood 0")], &request("say new")).await;
        assert_eq!(text(oldest).await, "new", "its own older replies made room");
    });
}

#[test]
fn promises_are_kept_and_one_that_could_not_be_is_not_given() {
    run(async {
        let server = Server::start(Options { max_num_seqs: 32, ..store(1 << 20, 4) }).await;
        let (http, other) = (client(1), client(2));
        let headers = [("prefer", "respond-async, wait=0")];
        let mut promised = Vec::new();
        for _ in 0..4 {
            let response = chat(&http, &server, &headers, &request("slow 200")).await;
            assert_eq!(response.status(), 202);
            assert_eq!(response.headers()["preference-applied"], "respond-async, wait=0");
            promised.push(response.headers()["glm-stream-id"].to_str().unwrap().to_owned());
        }
        // Streams with a key that are left alone are counted apart, and end each other only.
        for number in 0..6 {
            let key = ("idempotency-key", &*format!("{number}"));
            let left = async { chat(&http, &server, &[key], &request("slow 230")).await };
            assert!(tokio::time::timeout(Duration::from_millis(50), left).await.is_err());
        }
        let body = request("slow 50");
        let (fifth, others) =
            tokio::join!(chat(&http, &server, &headers, &body), chat(&other, &server, &headers, &body));
        assert_eq!(fifth.status(), 200, "it is answered when it is complete");
        assert!(!fifth.headers().contains_key("preference-applied"));
        assert_eq!(text(fifth).await.as_str().unwrap().len(), 50);
        assert_eq!(others.status(), 202, "another client has promises of its own");
        for id in promised {
            let response = server.get_stream(&id, &[]).await;
            assert_eq!(response.status(), 200);
            assert_eq!(text(response).await.as_str().unwrap().len(), 200);
        }
        server.until("glmserve_streams_detached", 0).await;
    });
}
