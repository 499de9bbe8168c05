//! What pages in browsers may do, end to end: preflights, foreign origins, and what a page may read.

use std::time::Duration;

use crate::support::{Options, Server, read_all, request, run, streaming, two_keys};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

const PAGE: &str = "https://chat.example";

fn options() -> Options {
    Options { allowed_origins: PAGE, keys: Some(two_keys()), ..Options::default() }
}

fn header<'a>(response: &'a reqwest::Response, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

fn varies_by(response: &reqwest::Response, name: &str) -> bool {
    let values = response.headers().get_all("vary");
    values.iter().any(|value| value.to_str().unwrap().split(", ").any(|varies| varies == name))
}

/// The answer to bare bytes, up to the end of the connection.
async fn raw(server: &Server, text: &str) -> String {
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    socket.write_all(text.as_bytes()).await.unwrap();
    let answer = tokio::time::timeout(Duration::from_secs(20), read_all(socket)).await;
    answer.expect("an answer, and the end of the connection")
}

#[test]
fn a_preflight_is_answered_before_anybody_asks_for_a_key() {
    run(async {
        let server = Server::start(options()).await;
        let asked = "authorization, content-type, x-stainless-arch, idempotency-key";
        for path in ["/v1/chat/completions", "/v1/streams/x", "/v1/no/such", "/health"] {
            let headers = [
                ("origin", PAGE),
                ("access-control-request-method", "POST"),
                ("access-control-request-headers", asked),
                ("access-control-request-private-network", "true"),
            ];
            let response = server.call("OPTIONS", path, &headers, &Value::Null).await;
            assert_eq!(response.status(), 204, "{path}");
            assert_eq!(header(&response, "access-control-allow-origin"), PAGE);
            assert_eq!(header(&response, "access-control-allow-headers"), asked);
            assert_eq!(header(&response, "access-control-allow-methods"), "GET, HEAD, POST, DELETE, OPTIONS");
            assert_eq!(header(&response, "access-control-max-age"), "3600");
            assert_eq!(header(&response, "access-control-allow-private-network"), "true");
            assert_eq!(header(&response, "access-control-allow-credentials"), "");
            assert_eq!(header(&response, "content-length"), "");
            assert!(header(&response, "x-request-id").starts_with("req_"));
            for name in ["origin", "access-control-request-method", "access-control-request-headers"] {
                assert!(varies_by(&response, name), "{name}: {:?}", response.headers());
            }
        }
        let long = "x".repeat(5000);
        for wrong in [long.as_str(), "a: b", "schlüssel"] {
            let headers = [
                ("origin", PAGE),
                ("access-control-request-method", "POST"),
                ("access-control-request-headers", wrong),
            ];
            let response = server.call("OPTIONS", "/v1/models", &headers, &Value::Null).await;
            assert_eq!(
                (response.status().as_u16(), header(&response, "access-control-allow-headers")),
                (400, "")
            );
            let error: Value = response.json().await.unwrap();
            assert_eq!(error["error"]["param"], "access-control-request-headers");
        }
        let headers = [("origin", "https://evil.example"), ("access-control-request-method", "POST")];
        let response = server.call("OPTIONS", "/v1/chat/completions", &headers, &Value::Null).await;
        assert_eq!((response.status().as_u16(), header(&response, "access-control-allow-origin")), (403, ""));
        assert!(varies_by(&response, "origin"));
    });
}

#[test]
fn options_without_a_preflight_names_the_methods() {
    run(async {
        let server = Server::start(options()).await;
        for (path, status, allow) in [
            ("/v1/chat/completions", 204, "POST, OPTIONS"),
            ("/v1/models", 204, "GET, HEAD, OPTIONS"),
            ("/livez", 204, "GET, HEAD, OPTIONS"),
            ("/v1/no/such", 404, ""),
        ] {
            let response = server.call("OPTIONS", path, &[], &Value::Null).await;
            assert_eq!((response.status().as_u16(), header(&response, "allow")), (status, allow), "{path}");
        }
    });
}

#[test]
fn a_page_that_is_allowed_reads_every_answer() {
    run(async {
        let server = Server::start(options()).await;
        let key = ("authorization", "Bearer a");
        let origin = ("origin", PAGE);
        let say = request("say hi");
        let digest = ("glm-model-digest", "sha256:other");
        let answers = [
            (200, server.chat(&[key, origin], &say).await),
            (200, server.chat(&[key, origin], &streaming("say hi")).await),
            (500, server.chat(&[key, origin], &request("refuse")).await),
            (409, server.chat(&[key, origin, digest], &say).await),
            (401, server.chat(&[origin], &say).await),
            (404, server.call("GET", "/v1/no/such", &[key, origin], &Value::Null).await),
            (404, server.call("GET", "/no/such", &[origin], &Value::Null).await),
            (405, server.call("PUT", "/v1/models", &[key, origin], &Value::Null).await),
            (200, server.call("GET", "/metrics", &[origin], &Value::Null).await),
        ];
        for (status, response) in answers {
            assert_eq!(response.status(), status);
            assert_eq!(header(&response, "access-control-allow-origin"), PAGE, "{status}");
            let exposed = header(&response, "access-control-expose-headers");
            for name in [
                "x-request-id",
                "retry-after",
                "glm-stream-id",
                "glm-api-version",
                "glm-model-digest",
                "location",
                "preference-applied",
            ] {
                assert!(exposed.split(", ").any(|exposed| exposed == name), "{name}");
            }
            assert_eq!(header(&response, "access-control-allow-credentials"), "");
            assert!(varies_by(&response, "origin"), "{status}");
        }
        let nobody = server.chat(&[key], &say).await;
        assert_eq!((nobody.status().as_u16(), header(&nobody, "access-control-allow-origin")), (200, ""));
        assert!(varies_by(&nobody, "origin"));
    });
}

#[test]
fn a_foreign_page_is_refused_before_its_body_is_read() {
    run(async {
        let server = Server::start(Options::default()).await;
        for origin in
            ["https://evil.example", "http://localhost.evil.com", "http://127.0.0.1@evil.com", "null"]
        {
            for (method, path) in
                [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")]
            {
                // Its body never comes, and neither does the end of its connection's time.
                let head = format!(
                    "{method} {path} HTTP/1.1\r\nhost: {}\r\norigin: {origin}\r\nconnection: close\r\n\
                     content-type: text/plain\r\ncontent-length: 9\r\n\r\n",
                    server.address
                );
                let answer = raw(&server, &head).await;
                assert!(answer.starts_with("HTTP/1.1 403"), "{origin}: {answer}");
                assert!(answer.contains("\"code\":\"origin_not_allowed\""), "{answer}");
                assert!(
                    answer.contains("\"type\":\"invalid_request_error\",\"param\":\"origin\""),
                    "{answer}"
                );
                assert!(!answer.contains("access-control-allow-origin"), "{answer}");
            }
        }
        assert_eq!(server.metric("glmserve_http_requests_refused_total{code=\"origin_not_allowed\"}"), 12.0);
        for origin in ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:1"] {
            let response = server.chat(&[("origin", origin)], &request("say hi")).await;
            assert_eq!(
                (response.status().as_u16(), header(&response, "access-control-allow-origin")),
                (200, origin)
            );
        }
    });
}

#[test]
fn several_origins_are_none_that_is_allowed() {
    run(async {
        let server = Server::start(Options { allowed_origins: "*", ..Options::default() }).await;
        for origins in
            ["origin: http://a.example\r\norigin: http://a.example", "origin: http://a.example http://b"]
        {
            let head =
                format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{origins}\r\n\r\n");
            let answer = raw(&server, &head).await;
            assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
        }
    });
}

#[test]
fn a_page_of_the_server_itself_passes_where_its_name_cannot_have_been_rebound() {
    run(async {
        let get = |host: &str, more: &str| {
            let headers = format!("host: {host}\r\norigin: http://{host}\r\nconnection: close\r\n{more}");
            format!("GET /livez HTTP/1.1\r\n{headers}\r\n")
        };
        let open = Server::start(Options { allowed_origins: PAGE, ..Options::default() }).await;
        let guarded = Server::start(options()).await;
        for (host, without_keys) in [
            ("127.0.0.1:8000", "200"),
            ("[fd00::5]:8000", "200"),
            ("localhost:8000", "200"),
            ("chat.example:8000", "200"),
            ("rebound.evil.com:8000", "403"),
        ] {
            let answer = raw(&open, &get(host, "")).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {without_keys}")), "{host}: {answer}");
            let answer = raw(&guarded, &get(host, "")).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{host}: {answer}");
        }
        // What a page can set does not count, and neither does the name alone.
        let forged = get("rebound.evil.com", "x-forwarded-host: 127.0.0.1\r\nforwarded: host=127.0.0.1\r\n");
        assert!(raw(&open, &forged).await.starts_with("HTTP/1.1 403"));
        let other_port =
            get("127.0.0.1:8000", "").replacen("host: 127.0.0.1:8000", "host: 127.0.0.1:8001", 1);
        let elsewhere = other_port.replace("http://127.0.0.1:8000", "http://10.0.0.1:8000");
        assert!(raw(&open, &elsewhere).await.starts_with("HTTP/1.1 403"));
        assert!(raw(&open, &other_port).await.starts_with("HTTP/1.1 403"), "localhost is not listed");
    });
}
