//! The server's newer edges: slow readers, the handshake, and health that follows the engine.

use std::net::SocketAddr;
use std::time::Duration;

use crate::support::events::{Events, complete_text};
use crate::support::{Options, Server, read_all, request, run, streaming};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};

const MS: Duration = Duration::from_millis(1);

#[test]
fn a_client_that_never_reads_is_cut_and_may_come_back() {
    // Its events are several times what buffers hold; the script's work grows with the square.
    const FLOOD: &str = "flood 1500";
    run(async {
        let options = Options { max_model_len: 2048, write_timeout: 1000 * MS, ..Options::default() };
        let server = Server::start(options).await;
        let body = streaming(FLOOD).to_string();
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
        let events = Events::of(server.chat(&[("idempotency-key", "k")], &streaming(FLOOD)).await);
        assert_eq!(complete_text(&events.rest().await).len(), 1500);
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
        let chat = &capabilities["chat_completions"];
        assert!(chat["fields"].as_array().unwrap().contains(&json!("stop")));
        assert!(chat["fields"].as_array().unwrap().contains(&json!("stream_options.include_usage")));
        assert!(chat["fields_without_effect"].as_array().unwrap().contains(&json!("messages[].name")));
        assert_eq!(chat["fields_refused"]["n"], "only n = 1 is supported");
        assert_eq!(chat["max_stops"], 64);
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
            loop {
                let (status, reason) = server.get("/livez").await;
                if status != 200 {
                    break (status, reason);
                }
                tokio::time::sleep(10 * MS).await;
            }
        };
        // Only a test that fails waits so long.
        let watching = tokio::time::timeout(10_000 * MS, watching);
        let ((status, _), dead) = tokio::join!(hanging, watching);
        let (live, reason) = dead.expect("it was alive all the time");
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

#[test]
fn methods_are_answered_as_http_says() {
    run(async {
        let server = Server::start(Options::default()).await;
        for path in ["/livez", "/readyz", "/startupz", "/health", "/metrics", "/v1/models"] {
            assert_eq!(server.call("HEAD", path, &[], &Value::Null).await.status(), 200, "{path}");
        }
        for (method, path, allowed) in [
            ("GET", "/v1/chat/completions", "POST, OPTIONS"),
            ("PUT", "/readyz", "GET, HEAD, OPTIONS"),
            ("POST", "/v1/streams/x", "GET, HEAD, DELETE, OPTIONS"),
        ] {
            let response = server.call(method, path, &[], &Value::Null).await;
            assert_eq!(
                (response.status().as_u16(), response.headers()["allow"].as_bytes()),
                (405, allowed.as_bytes())
            );
        }
    });
}

async fn raw(server: &Server, text: &str) -> String {
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    socket.write_all(text.as_bytes()).await.unwrap();
    tokio::time::timeout(5000 * MS, read_all(socket)).await.expect("an answer, and the end of the connection")
}

#[test]
fn a_proxy_that_speaks_http_1_0_gets_a_whole_stream_without_chunks() {
    run(async {
        let server = Server::start(Options::default()).await;
        let body = streaming("say abc").to_string();
        let head = format!("POST /v1/chat/completions HTTP/1.0\r\ncontent-length: {}\r\n\r\n", body.len());
        let answer = raw(&server, &(head + &body)).await;
        assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
        assert!(!answer.contains("transfer-encoding"), "{answer}");
        assert!(answer.contains("\r\n\r\ndata: {"), "{answer}");
        assert!(answer.ends_with("data: [DONE]\n\n"), "{answer}");
    });
}

#[test]
fn a_body_that_cannot_be_taken_is_refused_before_it_is_sent() {
    run(async {
        let server = Server::start(Options::default()).await;
        let start = |headers: &str| {
            format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n\r\n")
        };
        let answer = raw(&server, &start("content-length: 2000000")).await;
        assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("body_too_large"), "{answer}");
        let answer = raw(&server, &start("content-encoding: br\r\ncontent-length: 9")).await;
        assert!(answer.starts_with("HTTP/1.1 415") && answer.contains("unsupported_encoding"), "{answer}");
    });
}

/// Whether the kernel has a server's end of a client's connection, or will have it.
fn is_held(server: SocketAddr, client: SocketAddr) -> bool {
    let [server, client] = [server, client].map(|address| format!("0100007F:{:04X}", address.port()));
    std::fs::read_to_string("/proc/net/tcp").unwrap().contains(&format!("{server} {client} "))
}

#[test]
fn answers_in_one_piece_that_nobody_reads_are_cut_too() {
    const NUM_ANSWERS: usize = 200;
    run(async {
        let server = Server::start(Options { write_timeout: 300 * MS, ..Options::default() }).await;
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut socket = socket.connect(server.address).await.unwrap();
        let requests = "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n".repeat(NUM_ANSWERS);
        socket.write_all(requests.as_bytes()).await.unwrap();
        let client = socket.local_addr().unwrap();
        for _ in 0..3000 {
            if !is_held(server.address, client) {
                break;
            }
            tokio::time::sleep(20 * MS).await;
        }
        assert!(!is_held(server.address, client), "not cut after a minute");
        let text = tokio::time::timeout(5000 * MS, read_all(socket)).await.expect("the connection ends");
        let num_answers = text.matches("HTTP/1.1 200").count();
        assert!((1..NUM_ANSWERS).contains(&num_answers), "{num_answers} answers came");
    });
}
