//! What happens when the engine fails in a way that only a new process heals: streams hear of it, liveness
//! fails, and the server ends with an error that stands for an exit code of its own.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::support::{Options, Server, read_all, request, run, streaming};
use glm_engine::Fault;
use glmserve::{EngineFailure, ServeError};
use serde_json::json;

/// A GET that lets nothing else of this thread run, so that the server can't end meanwhile.
fn get_blocking(server: &Server, path: &str) -> String {
    let mut socket = TcpStream::connect(server.address).unwrap();
    write!(socket, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    answer
}

/// Sends a plain request; returns its answer once the engine's thread has ended, which happens at once.
fn fail_blocking(server: &Server, command: &str) -> String {
    let body = request(command).to_string();
    let mut socket = TcpStream::connect(server.address).unwrap();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close";
    write!(socket, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    while server.state.engine.status().alive {
        std::thread::yield_now();
    }
    answer
}

async fn failure(server: Server) -> EngineFailure {
    let error = server.ended().await.unwrap_err();
    assert!(error.is_engine_failure(), "{error}");
    match error {
        ServeError::Engine(failure) => failure,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_lost_device_ends_every_stream_with_its_error_and_then_the_server() {
    run(async {
        let server = Server::start(Options { max_num_seqs: 2, ..Options::default() }).await;
        let running = server.open(&streaming("slow 220")).await;
        server.until("glmserve_delivered_time_to_first_token_seconds_count", 1).await;
        let answer = fail_blocking(&server, "lose");
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("device_lost"), "{answer}");
        assert!(answer.to_lowercase().contains("retry-after: 5"), "{answer}");
        // The device's own words are for the log.
        assert!(!answer.contains("gone"), "{answer}");
        let live = get_blocking(&server, "/livez");
        assert!(live.starts_with("HTTP/1.1 503") && live.contains("the engine thread has ended"), "{live}");
        let refused = fail_blocking(&server, "say hi");
        assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
        let text = read_all(running).await;
        assert!(text.contains("\"code\":\"device_lost\"") && text.contains("data: [DONE]"), "{text}");
        assert_eq!(failure(server).await, EngineFailure::DeviceLost);
    });
}

#[test]
fn a_panic_of_the_engine_ends_the_server_too() {
    run(async {
        let server = Server::start(Options::default()).await;
        let running = server.open(&streaming("slow 220")).await;
        server.until("glmserve_delivered_time_to_first_token_seconds_count", 1).await;
        let answer = fail_blocking(&server, "panic");
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("engine_died"), "{answer}");
        let text = read_all(running).await;
        assert!(text.contains("\"code\":\"engine_died\"") && text.contains("data: [DONE]"), "{text}");
        assert_eq!(failure(server).await, EngineFailure::Died);
    });
}

/// Fails three steps in a row, which is a fault, and all that come after.
async fn break_engine(server: &Server) {
    for _ in 0..3 {
        let (status, error) = server.post(request("break")).await;
        assert_eq!((status, &error["error"]["code"]), (500, &json!("model_failed")));
    }
}

#[test]
fn an_engine_that_never_gives_its_known_answer_ends_the_server_after_the_time_for_it() {
    run(async {
        let fault_exit_timeout = Some(Duration::from_millis(1500));
        let server = Server::start(Options { fault_exit_timeout, ..Options::default() }).await;
        break_engine(&server).await;
        match failure(server).await {
            EngineFailure::NotHealed { fault: Fault::RepeatedRunErrors { count }, waited } => {
                // At least one known answer was asked for after the fault.
                assert!(count > 3 && waited >= Duration::from_millis(1500), "{count} {waited:?}");
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn without_a_time_limit_the_known_answer_is_asked_for_ever() {
    run(async {
        let server = Server::start(Options::default()).await;
        break_engine(&server).await;
        // Each known answer that fails raises the count: two of them, and the server is still there.
        let count = || match server.state.engine.status().fault {
            Some(Fault::RepeatedRunErrors { count }) => count,
            other => panic!("{other:?}"),
        };
        while count() < 5 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(server.get("/livez").await.0, 200);
        let (status, text) = server.get("/readyz").await;
        assert!(status == 503 && text.contains("known answer"), "{status} {text}");
    });
}
