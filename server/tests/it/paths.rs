//! How requests are named and their paths read, end to end.

use std::io::Write;
use std::sync::Mutex;
use std::time::Duration;

use crate::support::events::{Events, complete_text};
use crate::support::{Options, Server, read_all, request, run, streaming, two_keys};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

fn request_id(response: &reqwest::Response) -> &str {
    response.headers()["x-request-id"].to_str().unwrap()
}

/// The answer to a request without a body, up to the end of the connection.
async fn raw(server: &Server, method: &str, path: &str, headers: &str) -> String {
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), read_all(socket)).await.expect("an answer")
}

#[test]
fn every_answer_has_the_id_of_its_request() {
    run(async {
        let server = Server::start(Options { keys: Some(two_keys()), ..Options::default() }).await;
        let (key, id) = (("authorization", "Bearer a"), ("x-request-id", "trace-7/αβ"));
        let id = (id.0, &id.1[..7]);
        let preflight = [id, ("origin", "http://localhost"), ("access-control-request-method", "GET")];
        let answers = [
            (200, server.chat(&[key, id], &request("say hi")).await),
            (200, server.chat(&[key, id], &streaming("say hi")).await),
            (500, server.chat(&[key, id], &request("refuse")).await),
            (400, server.chat(&[key, id], &Value::Bool(true)).await),
            (401, server.chat(&[id], &request("say hi")).await),
            (409, server.chat(&[key, id, ("glm-model-digest", "x")], &request("say hi")).await),
            (403, server.call("GET", "/livez", &[id, ("origin", "http://evil")], &Value::Null).await),
            (404, server.call("GET", "/no/such", &[id], &Value::Null).await),
            (404, server.call("GET", "/v1/streams/x", &[key, id], &Value::Null).await),
            (405, server.call("PUT", "/v1/models", &[key, id], &Value::Null).await),
            (204, server.call("OPTIONS", "/v1/models", &preflight, &Value::Null).await),
            (200, server.call("HEAD", "/metrics", &[id], &Value::Null).await),
        ];
        for (status, response) in answers {
            assert_eq!((response.status().as_u16(), request_id(&response)), (status, "trace-7"));
        }
        let mut made = Vec::new();
        for sent in [&[][..], &["a b"], &["x".repeat(129).as_str()], &["a", "b"], &[""]] {
            let headers: Vec<_> = sent.iter().map(|sent| ("x-request-id", *sent)).collect();
            let response = server.call("GET", "/livez", &headers, &Value::Null).await;
            made.push(request_id(&response).to_owned());
        }
        assert!(made.iter().all(|id| id.starts_with("req_") && id.len() == 36), "{made:?}");
        made.sort_unstable();
        made.dedup();
        assert_eq!(made.len(), 5);
    });
}

/// What this program's servers log.
struct Log;

static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn what_is_logged_for_a_request_has_its_id() {
    tracing_subscriber::fmt().with_ansi(false).with_writer(|| Log).init();
    run(async {
        let options = Options {
            status_hold: Duration::from_millis(10),
            max_model_len: 2048,
            write_timeout: Duration::from_millis(500),
            ..Options::default()
        };
        let server = Server::start(options).await;
        // Its headers are gone when it fails, so the pump and the body have something to log.
        let late = server.chat(&[("x-request-id", "late-1")], &streaming("late 300")).await;
        assert_eq!(late.status(), 200);
        assert!(late.text().await.unwrap().contains("model_failed"));
        assert_eq!(server.chat(&[("x-request-id", "early-1")], &request("refuse")).await.status(), 500);
        // More than the buffers between here and there hold.
        let body = streaming("flood 1500").to_string();
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut socket = socket.connect(server.address).await.unwrap();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-request-id: slow-1\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all((head + &body).as_bytes()).await.unwrap();
        for (id, words) in [
            ("late-1", "a reply failed"),
            ("late-1", "a step failed"),
            ("early-1", "a reply failed"),
            ("early-1", "code=\"model_failed\""),
            ("slow-1", "took no bytes"),
        ] {
            // What is logged is not answered, so it may come a little later.
            for tries in 0.. {
                let log = String::from_utf8(LOG.lock().unwrap().clone()).unwrap();
                let is_it = |line: &&str| line.contains(&format!("id=\"{id}\"")) && line.contains(words);
                if log.lines().any(|line| is_it(&line)) {
                    break;
                }
                assert!(tries < 3000, "{id}: {words} in {log}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
}

#[test]
fn a_head_is_followed_by_no_body_and_has_the_headers_of_the_answer() {
    run(async {
        let server = Server::start(Options::default()).await;
        for path in [
            "/livez",
            "/readyz",
            "/startupz",
            "/health",
            "/v1/models",
            "/v1/models/alias/of",
            "/v1/capabilities",
            "/no/such",
        ] {
            let names = |answer: &str| {
                let head = answer.split("\r\n\r\n").next().unwrap().to_owned();
                let lines = head
                    .lines()
                    .filter(|line| !line.starts_with("x-request-id") && !line.starts_with("date"));
                let mut lines: Vec<String> = lines.map(str::to_owned).collect();
                lines.sort_unstable();
                lines
            };
            let (head, get) = (raw(&server, "HEAD", path, "").await, raw(&server, "GET", path, "").await);
            assert_eq!(names(&head), names(&get), "{path}");
            assert!(names(&head).iter().any(|line| line.starts_with("content-length: ")), "{head}");
            assert!(head.ends_with("\r\n\r\n"), "{head}");
        }
        // On one connection the next answer follows at once.
        let key = ("idempotency-key", "k");
        let stream = Events::of(server.chat(&[key], &streaming("say hi")).await).stream_id();
        let mut socket = TcpStream::connect(server.address).await.unwrap();
        for path in [&format!("/v1/streams/{stream}"), "/v1/models", "/no/such"] {
            socket.write_all(format!("HEAD {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(socket.read_u8().await.unwrap());
            }
            assert!(head.starts_with(b"HTTP/1.1 "), "{path}: {:?}", String::from_utf8_lossy(&head));
        }
        let last = "GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        socket.write_all(last.as_bytes()).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(20), read_all(socket)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    });
}

#[test]
fn doubled_and_trailing_slashes_find_their_route_with_the_body() {
    run(async {
        let server = Server::start(Options::default()).await;
        for path in ["/v1//chat/completions", "/v1/chat/completions/", "//v1/chat//completions//"] {
            let response = server.call("POST", path, &[], &streaming("say hi")).await;
            assert_eq!(complete_text(&Events::of(response).rest().await), "hi", "{path}");
        }
        for (path, id) in [
            ("/v1/models/test-model/", "test-model"),
            ("//v1//models//alias/of", "alias/of"),
            ("/v1/models/alias%2Fof", "alias/of"),
        ] {
            let (status, body) = server.get(path).await;
            let body: Value = serde_json::from_str(&body).unwrap();
            assert_eq!((status, &body["id"]), (200, &Value::from(id)), "{path}");
        }
        for path in ["//v1/models", "/v1/models/", "/v1/models//?limit=2", "//livez//", "/metrics/"] {
            assert_eq!(server.get(path).await.0, 200, "{path}");
        }
        // Not one more name for a model whose name has slashes.
        for name in ["alias//of", "alias"] {
            let (status, body) = server.get(&format!("/v1/models/{name}")).await;
            assert!(status == 404 && body.contains(&format!("{name}\\\"")), "{status} {body}");
        }
    });
}

#[test]
fn what_is_not_there_is_named_as_it_was_asked_for() {
    run(async {
        let server = Server::start(Options::default()).await;
        for path in ["/v1/responses", "/v1//no//such/", "/", "//", "/v1", "/v1/"] {
            let answer = raw(&server, "GET", path, "").await;
            assert!(answer.starts_with("HTTP/1.1 404"), "{path}: {answer}");
            let body: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
            assert_eq!(body["error"]["code"], "unknown_url");
            let message = body["error"]["message"].as_str().unwrap();
            assert!(message.starts_with(&format!("there is nothing at {path};")), "{message}");
        }
    });
}
