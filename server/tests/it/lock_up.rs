//! Nobody can lock the server up: requests are answered beside idle, slow, huge and many others.

use std::time::Duration;

use crate::support::{Options, Server, request, run};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// Ends a test that hangs; nothing is timed.
const HANG: Duration = Duration::from_secs(60);
const BODY_BYTES: usize = 900_000;

/// A connection from 127.0.0.`number`: each is a peer of its own.
async fn connect(server: &Server, number: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, number], 0).into()).unwrap();
    socket.connect(server.address).await.unwrap()
}

fn head(framing: &str) -> String {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{framing}\r\n\r\n"
    )
}

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

/// A request that is answered, with a body of `num_bytes`, from 127.0.0.`number`.
async fn is_answered(server: &Server, number: u8, num_bytes: usize) -> bool {
    let body = format!("{}{}", request("say hi"), " ".repeat(num_bytes));
    let ask = async {
        let mut socket = connect(server, number).await;
        let head = head(&format!("connection: close\r\ncontent-length: {}", body.len()));
        socket.write_all((head + &body).as_bytes()).await.ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.ok()?;
        Some(answer)
    };
    let answer = tokio::time::timeout(HANG, ask).await.expect("an answer").unwrap_or_default();
    assert!(answer.starts_with("HTTP/1.1 "), "{answer}");
    answer.starts_with("HTTP/1.1 200")
}

/// What a slow client sends before it stops.
const STARTS: [(&str, &str); 4] = [
    ("transfer-encoding: chunked", ""),
    ("content-length: 1000000", ""),
    ("expect: 100-continue\r\ncontent-length: 1000000", ""),
    ("transfer-encoding: chunked\r\ncontent-encoding: zstd", ""),
];

#[test]
fn bodies_that_are_announced_and_never_come_hold_nothing() {
    run(async {
        let server = Server::start(Options::default()).await;
        for num_connections in [32, 256, 1024] {
            let mut idle = Vec::new();
            for i in 0..num_connections {
                let (framing, start) = STARTS[i % STARTS.len()];
                let mut socket = connect(&server, 1).await;
                socket.write_all((head(framing) + start).as_bytes()).await.unwrap();
                idle.push(socket);
            }
            for number in [1, 2] {
                assert!(is_answered(&server, number, 0).await, "beside {num_connections}");
                assert!(is_answered(&server, number, BODY_BYTES).await, "large, beside {num_connections}");
            }
        }
    });
}

#[test]
fn bodies_that_stop_halfway_give_way_to_those_that_go_on() {
    run(async {
        let server = Server::start(Options::default()).await;
        let part = "x".repeat(200_000);
        let mut slow = Vec::new();
        for _ in 0..32 {
            let mut socket = connect(&server, 1).await;
            let start = head("transfer-encoding: chunked") + &chunk(&format!("{{\"{part}"));
            // Some are cut while they write.
            let _ = socket.write_all(start.as_bytes()).await;
            slow.push(socket);
        }
        // A small one has room at once; a large one of anybody as soon as the others have stalled.
        for number in [1, 2] {
            assert!(is_answered(&server, number, 0).await);
            let large = async { while !is_answered(&server, number, BODY_BYTES).await {} };
            tokio::time::timeout(HANG, large).await.expect("room for a large body");
        }
        // Who was cut is told why.
        let mut answers = Vec::new();
        for mut socket in slow {
            let mut bytes = vec![0; 4096];
            let read = tokio::time::timeout(Duration::from_millis(1), socket.read(&mut bytes)).await;
            if let Ok(Ok(len)) = read {
                answers.push(String::from_utf8_lossy(&bytes[..len]).into_owned());
            }
        }
        assert!(answers.iter().any(|answer| answer.starts_with("HTTP/1.1 408")), "{answers:?}");
        for answer in &answers {
            let code = answer.contains("body_too_slow") || answer.contains("too_many_bodies");
            assert!(code, "{answer}");
        }
    });
}

#[test]
fn a_request_that_generates_has_given_its_bodys_memory_back() {
    run(async {
        let server = Server::start(Options { max_num_seqs: 32, ..Options::default() }).await;
        let mut endless = request("slow 10000");
        endless["ignore_eos"] = json!(true);
        let body = format!("{endless}{}", " ".repeat(BODY_BYTES));
        let mut running = Vec::new();
        for number in 1..=32 {
            let mut socket = connect(&server, 1).await;
            let request = head("transfer-encoding: chunked") + &chunk(&body) + "0\r\n\r\n";
            socket.write_all(request.as_bytes()).await.unwrap();
            running.push(socket);
            server.until("glmserve_requests_running", number).await;
        }
        assert!(is_answered(&server, 1, BODY_BYTES).await);
    });
}

#[test]
fn errors_of_bodies_are_openais_and_say_what_to_do() {
    run(async {
        let server = Server::start(Options { max_body_bytes: 100_000, ..Options::default() }).await;
        let response = server.send(vec![b' '; 100_001]).await;
        assert_eq!(response.status(), 413);
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["type"], "invalid_request_error");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains("100000 bytes") && message.contains("shorter"), "{message}");
    });
}
