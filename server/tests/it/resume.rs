//! Resume end to end: breaks, replays, keys, owners, and the limits of what is kept.

use std::time::Duration;

use crate::support::events::{Events, SseEvent, complete_text};
use crate::support::{Options, Server, request, run, streaming, two_keys};
use glmserve::stream::memory_store::StoreLimits;
use serde_json::{Value, json};

const LETTERS: &str = "abcdefghijklmnopqrstuvwxyz";

async fn error(response: reqwest::Response) -> (u16, String) {
    let status = response.status().as_u16();
    let body: Value = response.json().await.unwrap();
    (status, body["error"]["code"].as_str().unwrap().to_owned())
}

fn store(retention_ms: u64, max_bytes: usize, max_detached: usize) -> StoreLimits {
    StoreLimits { retention: Duration::from_millis(retention_ms), max_bytes, max_detached }
}

/// Reads `number` events and breaks the connection.
async fn read_some(mut events: Events, number: usize) -> Vec<SseEvent> {
    let mut read = Vec::new();
    for _ in 0..number {
        read.push(events.next().await.unwrap());
    }
    read
}

#[test]
fn a_break_after_any_event_loses_and_doubles_nothing() {
    run(async {
        let server = Server::start(Options::default()).await;
        for (command, pause, expected) in [
            ("say 1+1=2…你好👋🏽!", 0, "1+1=2…你好👋🏽!"),
            ("slow 26", 0, LETTERS),
            ("slow 26", 80, LETTERS),
            ("nothing", 0, ""),
        ] {
            for cut in 0.. {
                let key = format!("{command} {pause} {cut}");
                let mut body = streaming(command);
                body["stream_options"] = json!({"include_usage": true});
                let key =
                    ("idempotency-key", key.as_bytes().iter().map(|b| format!("{b:x}")).collect::<String>());
                let key = (key.0, key.1.as_str());
                let events = Events::of(server.chat(&[key], &body).await);
                let id = events.stream_id();
                let mut read = read_some(events, cut).await;
                tokio::time::sleep(Duration::from_millis(pause)).await;
                let cursor = read.last().map(|event| event.id.clone());
                let mut headers = vec![key];
                headers.extend(cursor.iter().map(|cursor| ("last-event-id", cursor.as_str())));
                let rest = match cut % 2 {
                    0 => server.chat(&headers, &body).await,
                    _ => server.get_stream(&id, &headers).await,
                };
                let rest = Events::of(rest);
                assert_eq!(rest.stream_id(), id);
                let rest = rest.rest().await;
                let is_end = rest.is_empty();
                read.extend(rest);
                assert_eq!(complete_text(&read), expected, "cut after {cut}");
                if is_end {
                    assert!(read.len() >= 3, "role, finish, usage");
                    break;
                }
            }
        }
        server.until("glmserve_requests_running", 0).await;
        server.until("glmserve_streams_total{outcome=\"abort\"}", 0).await;
        server.until("glmserve_streams_detached", 0).await;
    });
}

#[test]
fn a_key_generates_once_whoever_asks_and_when() {
    run(async {
        let server = Server::start(Options::default()).await;
        let body = streaming("slow 26");
        let key = ("idempotency-key", "k");
        let keys = [key];
        let (one, two) = tokio::join!(server.chat(&keys, &body), server.chat(&keys, &body));
        let (one, two) = (Events::of(one), Events::of(two));
        assert_eq!(one.stream_id(), two.stream_id());
        let (one, two) = tokio::join!(one.rest(), two.rest());
        assert_eq!(one, two);
        assert_eq!(complete_text(&one), LETTERS);
        let replay = Events::of(server.chat(&[key], &body).await).rest().await;
        assert_eq!(replay, one);
        // Delivery, the order of fields and those without effect are not part of the request.
        let plain = json!({"messages": [{"content": "slow 26", "role": "user", "name": "n"}], "temperature": 0,
            "model": "test-model", "user": "u", "seed": null});
        let plain: Value = server.chat(&[key], &plain).await.json().await.unwrap();
        assert_eq!(plain["choices"][0]["message"]["content"], LETTERS);
        assert_eq!(plain["id"], one[0].document["id"]);
        assert_eq!(plain["glm"], one.last().unwrap().document["glm"]);
        assert_eq!(server.metric("glmserve_streams_total{outcome=\"stop\"}"), 1.0);
        assert_eq!(server.metric("glmserve_streams_resumed_total"), 3.0);
        let other = error(server.chat(&[key], &streaming("slow 25")).await).await;
        assert_eq!(other, (422, "idempotency_key_reused".into()));
        let other =
            error(server.chat(&[key, ("last-event-id", "00000000.1.0")], &streaming("slow 25")).await).await;
        assert_eq!(other, (422, "idempotency_key_reused".into()));
    });
}

#[test]
fn a_plain_request_that_is_tried_again_gets_the_same_answer() {
    run(async {
        let server = Server::start(Options::default()).await;
        let body = request("slow 200");
        let key = ("idempotency-key", "k");
        let first = tokio::time::timeout(Duration::from_millis(100), server.chat(&[key], &body)).await;
        assert!(first.is_err(), "the client gave up");
        server.until("glmserve_streams_detached", 1).await;
        let keys = [key];
        let (one, two) = tokio::join!(server.chat(&keys, &body), server.chat(&keys, &body));
        let (one, two): (Value, Value) = (one.json().await.unwrap(), two.json().await.unwrap());
        assert_eq!(one, two);
        assert_eq!(one["usage"]["completion_tokens"], 204);
        server.until("glmserve_streams_total{outcome=\"stop\"}", 1).await;
    });
}

#[test]
fn wrong_cursors_are_refused() {
    run(async {
        let server = Server::start(Options::default()).await;
        let key = ("idempotency-key", "k");
        let body = streaming("say ab");
        let events = Events::of(server.chat(&[key], &body).await);
        let id = events.stream_id();
        let events = events.rest().await;
        assert_eq!(events.len(), 4);
        let tag = events[0].id.split('.').next().unwrap();
        for (cursor, expected) in [
            ("x", (400, "invalid_header")),
            ("1.0", (400, "invalid_header")),
            ("TAG.1", (400, "invalid_header")),
            ("TAG.01.0", (400, "invalid_header")),
            ("TAG.4.0", (409, "cursor_out_of_range")),
            ("TAG.1.1", (409, "cursor_out_of_range")),
            ("TAG.3.2", (409, "cursor_out_of_range")),
            ("TAG.99999999.0", (409, "cursor_out_of_range")),
            ("0123abcd.1.0", (409, "cursor_of_another_stream")),
        ] {
            let cursor = cursor.replace("TAG", tag);
            let cursor = ("last-event-id", cursor.as_str());
            let expected = (expected.0, expected.1.to_owned());
            assert_eq!(error(server.get_stream(&id, &[cursor]).await).await, expected, "{cursor:?}");
            assert_eq!(error(server.chat(&[key, cursor], &body).await).await, expected, "{cursor:?}");
        }
        let (first, last) = (format!("{tag}.1.0"), format!("{tag}.3.1"));
        let cursor = ("last-event-id", first.as_str());
        assert_eq!(error(server.chat(&[cursor], &body).await).await.1, "invalid_header");
        assert_eq!(error(server.chat(&[key, cursor], &request("say ab")).await).await.1, "invalid_header");
        let unknown = error(server.chat(&[("idempotency-key", "new"), cursor], &body).await).await;
        assert_eq!(unknown, (410, "stream_gone".into()));
        // A client that asked for the usage may come back without.
        let last = Events::of(server.get_stream(&id, &[("last-event-id", &last)]).await);
        assert_eq!(last.rest().await, []);
    });
}

#[test]
fn a_cursor_of_an_earlier_stream_under_the_key_never_joins_the_present_one() {
    run(async {
        let options = Options { store_limits: store(50, 1 << 20, 16), ..Options::default() };
        let server = Server::start(options).await;
        let key = ("idempotency-key", "k");
        let body = streaming("say abc");
        let earlier = Events::of(server.chat(&[key], &body).await);
        let id = earlier.stream_id();
        let earlier = earlier.rest().await;
        while server.get_stream(&id, &[]).await.status() != 404 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // The key is free, so the same body under it is another reply; sampled, it might say something else.
        let mut present = Events::of(server.chat(&[key], &streaming("slow 230")).await);
        assert_ne!(present.stream_id(), id);
        present.next().await.unwrap();
        for event in earlier {
            let headers = [key, ("last-event-id", event.id.as_str())];
            let expected = (409, "cursor_of_another_stream".to_owned());
            assert_eq!(error(server.chat(&headers, &streaming("slow 230")).await).await, expected);
            assert_eq!(error(server.get_stream(&present.stream_id(), &headers).await).await, expected);
        }
    });
}

#[test]
fn streams_and_keys_belong_to_their_owner() {
    run(async {
        let server = Server::start(Options { keys: Some(two_keys()), ..Options::default() }).await;
        let (a, b) = (("authorization", "Bearer a"), ("authorization", "Bearer b"));
        let key = ("idempotency-key", "k");
        let ours = Events::of(server.chat(&[a, key], &streaming("slow 100")).await);
        let id = ours.stream_id();
        assert!(id.len() * 4 >= 128, "{id}");
        let path = format!("/v1/streams/{id}");
        let not_found = (404, "stream_not_found".to_owned());
        assert_eq!(error(server.get_stream(&id, &[b]).await).await, not_found);
        assert_eq!(error(server.call("DELETE", &path, &[b], &Value::Null).await).await, not_found);
        assert_eq!(error(server.get_stream("0", &[a]).await).await, not_found);
        assert_eq!(server.get_stream(&id, &[]).await.status(), 401);
        let theirs = Events::of(server.chat(&[b, key], &streaming("say other")).await);
        assert_ne!(theirs.stream_id(), id);
        assert_eq!(complete_text(&theirs.rest().await), "other");
        assert_eq!(complete_text(&ours.rest().await).len(), 100);
    });
}

#[test]
fn a_deleted_stream_ends_for_all_readers_with_a_typed_error() {
    run(async {
        let server = Server::start(Options::default()).await;
        let endless = json!({"model": "test-model", "temperature": 0, "stream": true, "ignore_eos": true,
            "messages": [{"role": "user", "content": "slow 200"}]});
        for headers in [&[("idempotency-key", "k")][..], &[]] {
            let mut events = Events::of(server.chat(headers, &endless).await);
            let path = format!("/v1/streams/{}", events.stream_id());
            events.next().await.unwrap();
            assert_eq!(server.call("DELETE", &path, &[], &Value::Null).await.status(), 204);
            let last = events.rest().await.pop().unwrap();
            assert_eq!(last.document["error"]["code"], "aborted");
            server.until("glmserve_requests_running", 0).await;
            // A stream that nobody can come back to is forgotten at its end.
            let expected = if headers.is_empty() { 404 } else { 204 };
            assert_eq!(server.call("DELETE", &path, &[], &Value::Null).await.status(), expected);
        }
        let replay = Events::of(server.chat(&[("idempotency-key", "k")], &endless).await).rest().await;
        assert_eq!(replay.last().unwrap().document["error"]["code"], "aborted");
    });
}

#[test]
fn without_a_key_a_break_aborts_at_once_and_nobody_else_can_read() {
    run(async {
        let server = Server::start(Options::default()).await;
        let mut events = Events::of(server.chat(&[], &streaming("slow 200")).await);
        let id = events.stream_id();
        events.next().await.unwrap();
        assert_eq!(error(server.get_stream(&id, &[]).await).await, (409, "stream_not_resumable".into()));
        drop(events);
        server.until("glmserve_streams_total{outcome=\"abort\"}", 1).await;
        server.until("glmserve_requests_running", 0).await;
        assert_eq!(error(server.get_stream(&id, &[]).await).await.0, 404);
    });
}

#[test]
fn with_a_key_generation_outlives_a_break_for_the_grace_time() {
    run(async {
        let options = Options { resume_grace: Duration::from_millis(150), ..Options::default() };
        let server = Server::start(options).await;
        let key = ("idempotency-key", "k");
        let body = streaming("slow 230");
        let mut events = Events::of(server.chat(&[key], &body).await);
        let id = events.stream_id();
        events.next().await.unwrap();
        drop(events);
        server.until("glmserve_streams_detached", 1).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        // Who comes back stops the clock.
        let mut events = Events::of(server.get_stream(&id, &[]).await);
        server.until("glmserve_streams_detached", 0).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(server.metric("glmserve_requests_running"), 1.0);
        events.next().await.unwrap();
        drop(events);
        server.until("glmserve_streams_total{outcome=\"abort\"}", 1).await;
        let replay = Events::of(server.get_stream(&id, &[]).await).rest().await;
        assert_eq!(replay.last().unwrap().document["error"]["code"], "aborted");
        assert!(replay.len() > 50, "what was said is kept");
    });
}

#[test]
fn ended_streams_are_kept_for_a_time_and_a_number_of_bytes() {
    run(async {
        let options = Options { store_limits: store(300, 40_000, 16), ..Options::default() };
        let server = Server::start(options).await;
        let mut ids = Vec::new();
        for number in 0..20 {
            let key = format!("{number}");
            let events =
                Events::of(server.chat(&[("idempotency-key", &key)], &streaming("say abcdef")).await);
            ids.push(events.stream_id());
            events.rest().await;
            let bytes = server.metric("glmserve_stream_store_bytes");
            assert!(bytes <= 40_000.0, "{bytes}");
        }
        assert_eq!(server.get_stream(&ids[0], &[]).await.status(), 404, "the oldest went first");
        assert_eq!(server.get_stream(&ids[19], &[]).await.status(), 200);
        tokio::time::sleep(Duration::from_millis(350)).await;
        assert_eq!(server.get_stream(&ids[19], &[]).await.status(), 404);
        server.until("glmserve_stream_store_bytes", 0).await;
        let again = Events::of(server.chat(&[("idempotency-key", "19")], &streaming("say new")).await);
        assert_eq!(complete_text(&again.rest().await), "new", "the key is free again");
    });
}

#[test]
fn the_oldest_stream_without_a_reader_makes_room_for_the_newest() {
    run(async {
        let options =
            Options { store_limits: store(9999, 1 << 20, 2), keys: Some(two_keys()), ..Options::default() };
        let server = Server::start(options).await;
        let mut ids = Vec::new();
        for (api_key, number) in [("Bearer b", 0), ("Bearer a", 1), ("Bearer a", 2), ("Bearer a", 3)] {
            let key = format!("{number}");
            let headers = [("authorization", api_key), ("idempotency-key", &key)];
            let mut events = Events::of(server.chat(&headers, &streaming("slow 230")).await);
            ids.push(events.stream_id());
            events.next().await.unwrap();
            drop(events);
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        server.until("glmserve_streams_total{outcome=\"abort\"}", 1).await;
        assert_eq!(server.metric("glmserve_streams_detached"), 3.0);
        let replay = Events::of(server.get_stream(&ids[1], &[("authorization", "Bearer a")]).await);
        assert_eq!(replay.rest().await.last().unwrap().document["error"]["code"], "aborted");
        server.until("glmserve_streams_total{outcome=\"stop\"}", 3).await;
        server.until("glmserve_streams_detached", 0).await;
    });
}

#[test]
fn a_failure_before_any_text_frees_the_key_for_a_new_try() {
    run(async {
        let server =
            Server::start(Options { max_num_seqs: 1, max_num_waiting: 0, ..Options::default() }).await;
        let key = ("idempotency-key", "k");
        let blocker = Events::of(server.chat(&[], &streaming("slow 100")).await);
        assert_eq!(error(server.chat(&[key], &streaming("say ok")).await).await.0, 429);
        blocker.rest().await;
        assert_eq!(
            complete_text(&Events::of(server.chat(&[key], &streaming("say ok")).await).rest().await),
            "ok"
        );
        let key = ("idempotency-key", "broken");
        for number in 1..=2 {
            assert_eq!(
                error(server.chat(&[key], &streaming("refuse")).await).await,
                (500, "model_failed".into())
            );
            server.until("glmserve_streams_total{outcome=\"error\"}", number).await;
        }
    });
}

#[test]
fn a_request_that_ran_out_of_its_own_time_is_made_again_under_its_key() {
    run(async {
        let server = Server::start(Options::default()).await;
        let key = ("idempotency-key", "k");
        let body = request("slow 200");
        let hurry = [key, ("glm-timeout", "total=0.2")];
        assert_eq!(error(server.chat(&hurry, &body).await).await, (504, "request_timeout".into()));
        let answer: Value = server.chat(&[key], &body).await.json().await.unwrap();
        assert_eq!(answer["choices"][0]["message"]["content"].as_str().unwrap().len(), 200);
        // A complete one is kept, however little time the next one has.
        let again: Value = server.chat(&hurry, &body).await.json().await.unwrap();
        assert_eq!(again, answer);
        // Of a stream that broke off somebody has a part: it is read on to its error, and replayed.
        let (key, body) = (("idempotency-key", "s"), streaming("fail"));
        let first = Events::of(server.chat(&[key], &body).await);
        let id = first.stream_id();
        let read = first.rest().await;
        assert_eq!(read.last().unwrap().document["error"]["code"], "model_failed");
        let part = ("last-event-id", read[1].id.as_str());
        for rest in [server.chat(&[key, part], &body).await, server.get_stream(&id, &[part]).await] {
            assert_eq!(Events::of(rest).rest().await, read[2..]);
        }
        let again = Events::of(server.chat(&[key], &body).await);
        assert_eq!(again.stream_id(), id);
        assert_eq!(again.rest().await, read);
        // Another body is no new try.
        let key = ("idempotency-key", "t");
        let hurry = [key, ("glm-timeout", "total=0.2")];
        assert_eq!(error(server.chat(&hurry, &request("slow 200")).await).await.0, 504);
        let other = error(server.chat(&[key], &request("say ok")).await).await;
        assert_eq!(other, (422, "idempotency_key_reused".into()));
    });
}
