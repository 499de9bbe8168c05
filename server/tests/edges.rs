//! The server's newer edges: slow readers, the handshake, and health that follows the engine.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::events::{Events, complete_text};
use support::{Options, Server, request, run, streaming};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

const MS: Duration = Duration::from_millis(1);

#[test]
fn a_client_that_never_reads_is_cut_and_may_come_back() {
    run(async {
        let options = Options { max_model_len: 4096, write_timeout: 300 * MS, ..Options::default() };
        let server = Server::start(options).await;
        let body = streaming("flood 4000").to_string();
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut socket = socket.connect(server.address).await.unwrap();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nidempotency-key: k\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all((head + &body).as_bytes()).await.unwrap();
        // Others and the engine notice nothing.
        let (status, _) = server.post(request("say hi")).await;
        assert_eq!(status, 200);
        server.until("glmserve_streams_total{outcome=\"stop\"}", 2).await;
        server.until("glmserve_slow_readers_cut_total", 1).await;
        let events = Events::of(server.chat(&[("idempotency-key", "k")], &streaming("flood 4000")).await);
        assert_eq!(complete_text(&events.rest().await).len(), 4000);
        assert_eq!(server.metric("glmserve_slow_readers_cut_total"), 1.0);
        drop(socket);
    });
}

#[test]
fn delivery_is_timed_apart_from_generation() {
    run(async {
        let server = Server::start(Options::default()).await;
        let key = ("idempotency-key", "k");
        for _ in 0..2 {
            Events::of(server.chat(&[key], &streaming("say abc")).await).rest().await;
        }
        assert_eq!(server.metric("glmserve_time_to_first_token_seconds_count"), 1.0);
        assert_eq!(server.metric("glmserve_delivered_time_to_first_token_seconds_count"), 1.0);
        assert_eq!(server.metric("glmserve_delivery_lag_seconds_count"), 3.0, "replays don't count");
    });
}

#[test]
fn the_handshake_names_the_server_and_refuses_another_model() {
    run(async {
        let server = Server::start(Options::default()).await;
        let response = server.call("GET", "/v1/capabilities", &[], &Value::Null).await;
        assert_eq!(response.headers()["glm-api-version"], "1");
        let digest = response.headers()["glm-model-digest"].to_str().unwrap().to_owned();
        let capabilities: Value = response.json().await.unwrap();
        assert_eq!(capabilities["model_digest"], digest);
        assert_eq!(capabilities["models"], json!(["test-model", "alias/of"]));
        assert_eq!(capabilities["resume"]["max_key_bytes"], 255);
        assert!(capabilities["chat_completions"]["fields"].as_array().unwrap().contains(&json!("stop")));
        let same = server.chat(&[("glm-model-digest", &digest)], &request("say hi")).await;
        assert_eq!(
            (same.status().as_u16(), same.headers()["glm-model-digest"].to_str().unwrap()),
            (200, &*digest)
        );
        let other = server.chat(&[("glm-model-digest", "sha256:other")], &request("say hi")).await;
        assert_eq!(other.status(), 409);
        let error: Value = other.json().await.unwrap();
        assert_eq!(error["error"]["code"], "model_digest_mismatch");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains("sha256:other") && message.contains(&digest), "{message}");
    });
}

#[test]
fn a_fault_of_the_engine_is_unready_until_the_known_answer_comes() {
    run(async {
        let server = Server::start(Options::default()).await;
        assert_eq!(server.get("/startupz").await.0, 200);
        for _ in 0..3 {
            server.post(request("refuse")).await;
        }
        let (status, reason) = server.get("/readyz").await;
        assert!(status == 503 && reason.contains("fault"), "{reason}");
        assert_eq!((server.get("/livez").await.0, server.get("/startupz").await.0), (200, 200));
        for _ in 0..40 {
            if server.get("/readyz").await.0 == 200 {
                return;
            }
            tokio::time::sleep(100 * MS).await;
        }
        panic!("still unready: {:?}", server.get("/readyz").await);
    });
}

#[test]
fn an_engine_that_hangs_is_not_alive() {
    run(async {
        let server = Server::start(Options { stall_min: 100 * MS, ..Options::default() }).await;
        for _ in 0..3 {
            server.post(request("say abc")).await;
        }
        let body = request("pause 800");
        let hanging = server.post(body);
        let watching = async {
            tokio::time::sleep(400 * MS).await;
            server.get("/livez").await
        };
        let ((status, _), (live, reason)) = tokio::join!(hanging, watching);
        assert_eq!(status, 200);
        assert!(live == 503 && reason.contains("no progress"), "{live} {reason}");
        assert_eq!(server.get("/livez").await.0, 200);
    });
}

#[test]
fn overload_changes_neither_readiness_nor_liveness() {
    run(async {
        let server =
            Server::start(Options { max_num_seqs: 1, max_num_waiting: 2, ..Options::default() }).await;
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(server.open(&streaming("slow 200")).await);
        }
        server.until("glmserve_requests_waiting", 2).await;
        for _ in 0..20 {
            let (status, _) = server.post(request("say hi")).await;
            assert_eq!(status, 429);
            for path in ["/readyz", "/livez", "/startupz"] {
                assert_eq!(server.get(path).await.0, 200, "{path}");
            }
        }
    });
}
