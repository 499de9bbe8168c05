//! How many connections there may be, and which one is closed for a new one.

use std::time::Duration;

use crate::support::wire::{Wire, get, post};
use crate::support::{Options, Server, request, run, streaming};
use glmserve::http::ConnectionLimits;
use serde_json::json;
use tokio::net::TcpSocket;

/// Ends a test that hangs; nothing is timed.
const HANG: Duration = Duration::from_secs(60);

fn limits(max_total: usize, max_per_peer: usize) -> Options {
    let connection_limits = ConnectionLimits { max_total, max_per_peer };
    Options { connection_limits, max_num_seqs: 32, max_model_len: 8192, ..Options::default() }
}

/// A connection from 127.0.0.`number`: each is a peer of its own.
async fn connect(server: &Server, number: u8) -> Wire {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, number], 0).into()).unwrap();
    Wire { socket: socket.connect(server.address).await.unwrap(), buffer: Vec::new() }
}

/// The status of a small request on a connection; `None` if that is closed.
async fn status(wire: &mut Wire) -> Option<u16> {
    use tokio::io::AsyncWriteExt;
    let text = post("", &request("say hi").to_string());
    // A connection that was closed refuses bytes, or takes them and answers nothing.
    wire.socket.write_all(text.as_bytes()).await.ok()?;
    let answer = tokio::time::timeout(HANG, wire.answer()).await.expect("an answer or the end");
    answer.map(|answer| answer.status)
}

/// A connection whose reply goes on for longer than any test, and was seen to run.
async fn endless(server: &Server, number: u8, num_running: u64) -> Wire {
    let mut wire = connect(server, number).await;
    let mut body = streaming("slow 100000");
    body["ignore_eos"] = json!(true);
    wire.send(&post("", &body.to_string())).await;
    server.until("glmserve_requests_running", num_running).await;
    wire
}

#[test]
fn connections_that_wait_for_their_client_keep_nobody_out() {
    // Idle ones, slow heads, and bodies that do not come.
    let starts = [
        String::new(),
        "POST /v1/chat".to_owned(),
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{".to_owned(),
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".to_owned(),
    ];
    run(async {
        for start in &starts {
            let server = Server::start(limits(32, 32)).await;
            let mut waiting = Vec::new();
            for _ in 0..32 {
                let mut wire = connect(&server, 1).await;
                wire.send(start).await;
                waiting.push(wire);
            }
            // They stay open, so that each closes one of those.
            let mut new = Vec::new();
            for number in [1, 2, 1, 2, 1, 2] {
                let mut wire = connect(&server, number).await;
                assert_eq!(status(&mut wire).await, Some(200), "beside 32 times {start:?}");
                new.push(wire);
            }
            for wire in &mut new {
                assert_eq!(status(wire).await, Some(200), "the new ones are kept");
            }
        }
    });
}

#[test]
fn the_connection_that_was_idle_longest_is_closed_and_others_can_be_used_again() {
    run(async {
        let server = Server::start(limits(8, 8)).await;
        let mut kept_alive = Vec::new();
        for _ in 0..8 {
            let mut wire = connect(&server, 1).await;
            assert_eq!(status(&mut wire).await, Some(200));
            kept_alive.push(wire);
            // The time has a resolution of a millisecond.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // The first becomes the one that was used last.
        assert_eq!(status(&mut kept_alive[0]).await, Some(200));
        assert_eq!(status(&mut connect(&server, 2).await).await, Some(200));
        assert_eq!(status(&mut kept_alive[1]).await, None);
        for i in [0, 2, 3, 4, 5, 6, 7] {
            assert_eq!(status(&mut kept_alive[i]).await, Some(200), "connection {i}");
        }
    });
}

#[test]
fn one_peer_cannot_take_all_connections() {
    run(async {
        let server = Server::start(limits(8, 6)).await;
        let mut running = Vec::new();
        for number in 1..=6 {
            running.push(endless(&server, 1, number).await);
        }
        for _ in 0..3 {
            let answer = connect(&server, 1).await.answer().await.expect("a refusal before the request");
            assert_eq!((answer.status, answer.code()), (503, json!("too_many_connections")));
            assert!(answer.says_close() && answer.head.contains("\r\nretry-after: 1\r\n"), "{answer:?}");
            assert!(answer.head.contains("\r\nx-request-id: "), "{answer:?}");
        }
        let mut others = [connect(&server, 2).await, connect(&server, 3).await];
        for wire in &mut others {
            assert_eq!(status(wire).await, Some(200));
        }
        // The next one takes the place of an idle one, and not of one that reads its reply.
        assert_eq!(status(&mut connect(&server, 4).await).await, Some(200));
        server.until("glmserve_requests_running", 6).await;
    });
}

#[test]
fn a_connection_that_reads_its_reply_is_never_closed_for_another() {
    run(async {
        let server = Server::start(limits(4, 4)).await;
        let mut wire = connect(&server, 1).await;
        wire.send(&post("", &streaming("slow 300").to_string())).await;
        server.until("glmserve_requests_running", 1).await;
        let mut idle = Vec::new();
        for number in [1, 2, 3, 4].repeat(10) {
            idle.push(connect(&server, number).await);
        }
        // Until the server has accepted all of those, one of them may close a newer one.
        let mut answered = None;
        for _ in 0..50 {
            answered = answered.or(status(&mut connect(&server, 5).await).await);
        }
        assert_eq!(answered, Some(200));
        let answer = wire.answer().await.expect("the whole reply");
        assert!(answer.text().ends_with("data: [DONE]\n\n"), "{answer:?}");
        assert!(!answer.text().contains("\"error\""), "{answer:?}");
        // Once its reply has ended, it waits for its client like every other.
        assert_eq!(status(&mut wire).await, Some(200));
        let kept = connect(&server, 1).await.send(&get("/livez", "")).await.answer().await.map(|a| a.status);
        assert_eq!(kept, Some(200));
    });
}
