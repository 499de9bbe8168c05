//! The bytes on the wire: what a client reads in which part, and what becomes of its connection.

use std::time::Duration;

use crate::support::wire::{Wire, ask, chunked, get, post};
use crate::support::{Options, Server, request, run, streaming, two_keys};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

const MS: Duration = Duration::from_millis(1);

#[test]
fn heartbeats_and_ids_are_what_clients_of_each_kind_can_read() {
    run(async {
        let options = Options { comment_period: 60 * MS, status_hold: 10 * MS, ..Options::default() };
        let server = Server::start(options).await;
        for command in ["pause 400", "stall 400"] {
            for key in [String::new(), format!("idempotency-key: {}\r\n", &command[..5])] {
                let answer = ask(&server, &post(&key, &streaming(command).to_string())).await;
                let mut expected_id = 0;
                let mut after_beat = false;
                let mut num_beats = 0;
                for (i, part) in answer.parts.iter().enumerate() {
                    let is_beat = part.starts_with(": keep-alive");
                    num_beats += usize::from(is_beat);
                    if is_beat {
                        let end = if key.is_empty() { "\n\n" } else { "\n" };
                        assert!(part.trim_end_matches('\n').len() + end.len() == part.len(), "{part:?}");
                        assert_eq!(part.matches('\n').count(), end.len(), "{part:?}");
                        after_beat = true;
                        continue;
                    }
                    let event = match (key.is_empty(), after_beat) {
                        (true, true) => part.strip_prefix(":\n\n"),
                        _ => Some(part.as_str()),
                    };
                    let event = event.unwrap_or_else(|| panic!("after a heartbeat: {part:?}"));
                    let is_done = i + 1 == answer.parts.len();
                    let data = match key.is_empty() || is_done {
                        true => Some(event),
                        // What is in front of the place names the stream.
                        false => event
                            .strip_prefix("id: ")
                            .and_then(|event| event.split_once(&format!(".{expected_id}.0\n")))
                            .map(|(_, data)| data),
                    };
                    let data = data.unwrap_or_else(|| panic!("no id: {part:?}"));
                    assert!(data.starts_with("data: ") && data.ends_with("\n\n"), "{part:?}");
                    assert_eq!(data.matches('\n').count(), 2, "one event in each part: {part:?}");
                    assert_eq!(data == "data: [DONE]\n\n", is_done, "{part:?}");
                    expected_id += 1;
                    after_beat = false;
                }
                assert!(num_beats >= 2, "{answer:?}");
                let first_beat = answer.parts.iter().position(|part| part.starts_with(": keep-alive"));
                let role = answer.parts.iter().position(|part| part.contains("\"role\":\"assistant\""));
                match command {
                    "pause 400" => {
                        assert!(first_beat < role, "the role came before the first token: {answer:?}")
                    }
                    _ => assert!(role < first_beat, "{answer:?}"),
                }
            }
        }
        let mut quiet = streaming("pause 300");
        quiet["stream_options"] = json!({"heartbeat": false});
        let answer = ask(&server, &post("", &quiet.to_string())).await;
        for line in answer.text().lines().filter(|line| !line.is_empty()) {
            let data = line.strip_prefix("data: ").unwrap_or_else(|| panic!("{line}"));
            assert!(data == "[DONE]" || serde_json::from_str::<Value>(data).is_ok(), "{line}");
        }
        assert!(answer.text().ends_with("data: [DONE]\n\n"));
    });
}

#[test]
fn streams_are_utf8_and_no_json_has_a_line_break() {
    run(async {
        let server = Server::start(Options::default()).await;
        let command = "bytes 61 E2 80 A8 E2 80 A9 C2 85 E5 85 A5";
        let streamed = ask(&server, &post("", &streaming(command).to_string())).await;
        assert!(
            streamed.head.contains("\r\ncontent-type: text/event-stream; charset=utf-8\r\n"),
            "{streamed:?}"
        );
        let plain = ask(&server, &post("", &request(command).to_string())).await;
        // The name comes back in a message and in `param`.
        let mut wrong = request("say x");
        wrong["a\u{2028}b"] = json!(1);
        let wrong = ask(&server, &post("", &wrong.to_string())).await;
        for (answer, escape) in [(&streamed, r"\u2029"), (&plain, r"\u0085"), (&wrong, r"a\u2028b")] {
            let text = answer.text();
            assert!(text.contains(escape), "{text}");
            assert!(!text.contains(['\u{85}', '\u{2028}', '\u{2029}']), "{text}");
        }
        let plain: Value = serde_json::from_str(&plain.text()).unwrap();
        assert_eq!(plain["choices"][0]["message"]["content"], "a\u{2028}\u{2029}\u{85}入");
        assert_eq!(wrong.status, 400);
    });
}

#[test]
fn the_connection_headers_of_a_request_concern_nobody_and_the_connection_goes_on() {
    run(async {
        let server = Server::start(Options { keys: Some(two_keys()), ..Options::default() }).await;
        let key = "authorization: Bearer a\r\n";
        let chat = |command: &str| post(key, &request(command).to_string());
        let with = |request: &str, headers: &str| {
            request.replacen("host: x\r\n", &format!("host: x\r\n{headers}"), 1)
        };
        let requests = [
            (chat("say hi"), 200),
            (post(key, &streaming("say hi").to_string()), 200),
            (chunked(key, &request("say hi").to_string()), 200),
            (post(key, "{"), 400),
            (get("/v1/models", ""), 401),
            (get("/v1/models", key), 200),
            (get("/v1/nothing", key), 404),
            (get("/v1/chat/completions", key), 405),
            (get("/readyz", ""), 200),
            (get("/metrics", ""), 200),
            (post(&format!("{key}prefer: respond-async, wait=0\r\n"), &request("slow 20").to_string()), 202),
        ];
        for headers in [
            "connection: upgrade\r\n",
            "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n",
            "connection: keep-alive, Upgrade\r\nupgrade: websocket\r\n",
            "connection: keep-alive\r\nkeep-alive: timeout=5\r\nproxy-connection: keep-alive\r\n",
            "connection: TE, x-anything\r\nte: trailers, deflate\r\nx-anything: 1\r\n",
        ] {
            let mut wire = Wire::to(&server).await;
            for (request, status) in &requests {
                let is_websocket = headers.contains("websocket") && request.starts_with("POST");
                if is_websocket {
                    // A handshake has no body; what follows it would be another protocol.
                    continue;
                }
                let answer = wire.send(&with(request, headers)).await.answer().await.expect("an answer");
                assert_eq!(answer.status, *status, "{request} {answer:?}");
                for name in ["connection", "upgrade", "keep-alive", "te", "trailer", "http2-settings"] {
                    assert!(!answer.head.contains(&format!("\r\n{name}:")), "{headers} {request} {answer:?}");
                }
            }
            let last =
                wire.send(&get("/livez", "connection: Close, upgrade\r\n")).await.answer().await.unwrap();
            assert!(last.status == 200 && last.says_close(), "{last:?}");
            assert!(wire.is_closed().await);
        }
    });
}

#[test]
fn nothing_is_answered_behind_a_request_that_closes_the_connection() {
    run(async {
        let server = Server::start(Options::default()).await;
        let behind = post("", &request("say behind").to_string());
        let too_large = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000\r\n\r\n";
        let unread = "POST /v1/nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n";
        for (first, status) in [
            (too_large.to_owned(), 413),
            (unread.to_owned(), 404),
            (post("", "{").replace("/v1/chat/completions", "/v1/nothing"), 404),
            (get("/livez", "connection: close\r\n"), 200),
            (post("connection: close\r\n", "{"), 400),
            ("GET /livez HTTP/1.0\r\n\r\n".to_owned(), 200),
            (post("connection: close\r\n", &streaming("slow 5").to_string()), 200),
        ] {
            let mut wire = Wire::to(&server).await;
            wire.send(&format!("{first}{behind}{}", get("/livez", ""))).await;
            let answer = wire.answer().await.expect("an answer");
            assert_eq!(answer.status, status, "{first}");
            assert!(answer.says_close() || first.contains("HTTP/1.0"), "{answer:?}");
            assert!(wire.is_closed().await, "{first}: {:?}", String::from_utf8_lossy(&wire.buffer));
        }
        assert_eq!(server.metric("glmserve_streams_total{outcome=\"stop\"}"), 1.0, "the one that was first");
        // A body without an end is not read for ever.
        let endless =
            "POST /v1/nothing HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";
        let mut wire = Wire::to(&server).await;
        let answer = wire.send(endless).await.answer().await.unwrap();
        assert!(answer.status == 404 && answer.says_close(), "{answer:?}");
        assert!(wire.is_closed().await);
    });
}

#[test]
fn requests_sent_ahead_are_answered_in_order_and_a_refused_one_that_was_read_keeps_the_connection() {
    run(async {
        let server = Server::start(Options::default()).await;
        let mut wire = Wire::to(&server).await;
        let requests = [
            (post("", &streaming("slow 5").to_string()), 200, "abcde"),
            (chunked("", &request("say two").to_string()), 200, "two"),
            (post("", "{"), 400, "invalid_json"),
            (get("/v1/nothing", ""), 404, "unknown_url"),
            ("\r\n".to_owned() + &chunked("", "[]"), 400, "invalid_value"),
            (post("expect: 100-continue\r\n", &request("say six").to_string()), 100, ""),
        ];
        wire.send(&requests.iter().map(|(request, ..)| request.as_str()).collect::<String>()).await;
        for (i, (_, status, words)) in requests.iter().enumerate() {
            let answer = wire.answer().await.unwrap_or_else(|| panic!("no answer to request {i}"));
            assert_eq!(answer.status, *status, "{answer:?}");
            assert!(!answer.says_close(), "{answer:?}");
            if i > 0 {
                assert!(answer.text().contains(words), "{answer:?}");
            }
        }
        assert_eq!(wire.answer().await.unwrap().status, 200, "after the 100");
        assert_eq!(wire.send(&get("/livez", "")).await.answer().await.unwrap().status, 200);
    });
}

#[test]
fn a_large_body_sent_in_small_pieces_passes_whole() {
    run(async {
        let server = Server::start(Options { max_model_len: 20_000, ..Options::default() }).await;
        let body = format!("{}{}", " ".repeat(300_000), request("say large"));
        for text in [post("", &body), chunked("", &body)] {
            let mut wire = Wire::to(&server).await;
            for piece in text.as_bytes().chunks(7919) {
                wire.socket.write_all(piece).await.unwrap();
                tokio::task::yield_now().await;
            }
            let answer = wire.answer().await.unwrap();
            assert!(answer.status == 200 && answer.text().contains("large"), "{answer:?}");
            assert_eq!(wire.send(&get("/livez", "")).await.answer().await.unwrap().status, 200);
        }
    });
}

#[test]
fn what_is_no_http_request_is_answered_in_json_and_counted() {
    run(async {
        let server = Server::start(Options::default()).await;
        let head = |lines: &str| format!("POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n\r\n");
        let malformed = [
            "nonsense\r\n\r\n".to_owned(),
            "GET /livez HTTP/3.0\r\n\r\n".to_owned(),
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
            "GET /a b HTTP/1.1\r\nhost: x\r\n\r\n".to_owned(),
            "GET /livez HTTP/1.1\r\n\r\n".to_owned(),
            "CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n".to_owned(),
            "POST /livez HTTP/1.0\r\n\r\n".to_owned(),
            "\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}".to_owned(),
            head("host: x\r\nhost: y"),
            head("host: x\r\nbad header: 1"),
            head("host: x\r\n: none"),
            head("host: x\r\ncontent-length: 1\r\ncontent-length: 1"),
            head("host: x\r\ncontent-length: +1"),
            head("host: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked"),
            head("host: x\r\ntransfer-encoding: gzip, chunked"),
            head("host: x\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked"),
            head("host: x\r\nconnection: upgrade\r\nupgrade: websocket\r\ncontent-length: 5"),
            head("host: x\r\ntransfer-encoding: chunked\r\n\r\nnot a length"),
            head("host: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello too long\r\n"),
        ];
        let behind = get("/livez", "");
        for text in &malformed {
            let mut wire = Wire::to(&server).await;
            let answer = wire.send(&format!("{text}{behind}")).await.answer().await;
            let answer = answer.unwrap_or_else(|| panic!("no answer to {text:?}"));
            assert_eq!((answer.status, answer.code()), (400, json!("malformed_http")), "{text:?} {answer:?}");
            assert!(answer.says_close() && answer.head.contains("\r\nx-request-id: req_"), "{answer:?}");
            assert!(wire.is_closed().await, "{text:?}");
        }
        let counted = "glmserve_http_requests_refused_total{code=\"malformed_http\"}";
        assert_eq!(server.metric(counted), malformed.len() as f64);
        for text in [
            format!("GET /livez HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(70_000)),
            format!("GET /{}", "y".repeat(70_000)),
            head(&format!("host: x{}", "\r\nx: y".repeat(200))),
        ] {
            let answer = ask(&server, &text).await;
            assert_eq!((answer.status, answer.code()), (431, json!("head_too_large")));
        }
        // In its turn, behind what was well formed.
        let mut wire = Wire::to(&server).await;
        wire.send(&format!("{}{}nonsense\r\n\r\n", post("", &streaming("slow 20").to_string()), behind))
            .await;
        assert!(wire.answer().await.unwrap().text().ends_with("data: [DONE]\n\n"));
        assert_eq!(wire.answer().await.unwrap().status, 200);
        assert_eq!(wire.answer().await.unwrap().code(), "malformed_http");
        assert!(wire.is_closed().await);
    });
}

#[test]
fn a_head_that_does_not_arrive_in_time_is_answered() {
    run(async {
        let server = Server::start(Options::default()).await;
        let (mut first, mut second) = (Wire::to(&server).await, Wire::to(&server).await);
        first.send("GET /livez HTTP/1.1\r\nho").await;
        assert_eq!(second.send(&get("/livez", "")).await.answer().await.unwrap().status, 200);
        second.send("GET /livez HTTP/1.1\r\nho").await;
        for wire in [&mut first, &mut second] {
            let answer = wire.answer().await.expect("an answer");
            assert_eq!((answer.status, answer.code()), (408, json!("head_timeout")));
            assert!(answer.says_close() && wire.is_closed().await);
        }
        assert_eq!(server.metric("glmserve_http_requests_refused_total{code=\"head_timeout\"}"), 2.0);
    });
}

#[test]
fn a_client_that_leaves_is_noticed_though_it_sent_requests_ahead() {
    run(async {
        let server = Server::start(Options::default()).await;
        let mut wire = Wire::to(&server).await;
        let body = streaming("slow 200").to_string();
        wire.send(&format!("{}{}", post("", &body), post("", &body))).await;
        server.until("glmserve_requests_running", 1).await;
        drop(wire);
        server.until("glmserve_streams_total{outcome=\"abort\"}", 1).await;
        server.until("glmserve_requests_running", 0).await;
        assert_eq!(server.metric("glmserve_streams_total{outcome=\"stop\"}"), 0.0);
    });
}
