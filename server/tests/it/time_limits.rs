//! Time end to end: limits before and after headers, the hold, heartbeats, answers for later.

use std::time::Duration;

use crate::support::events::{Events, complete_text};
use crate::support::{Options, Server, request, run, streaming};
use glmserve::stream::time_limits::TimeLimits;
use serde_json::{Value, json};
use tokio::time::Instant;

const MS: Duration = Duration::from_millis(1);

async fn error(response: reqwest::Response) -> (u16, Value) {
    (response.status().as_u16(), response.json::<Value>().await.unwrap()["error"]["code"].clone())
}

async fn last_error(response: reqwest::Response) -> Value {
    Events::of(response).rest().await.pop().unwrap().document["error"]["code"].clone()
}

#[test]
fn each_limit_has_its_own_error_before_and_after_headers() {
    run(async {
        let cases = [
            ("queue=0.1", "say x", "queue_timeout", true),
            ("first-token=0.1", "pause 400", "first_token_timeout", false),
            ("inter-token=0.1", "stall 400", "inter_token_timeout", false),
            ("total=0.1, queue=60", "slow 230", "request_timeout", false),
        ];
        for (limit, command, code, needs_queue) in cases {
            for streamed in [false, true] {
                // A server for each: one that has learnt to expect the pause refuses the next at once.
                let options = Options { max_num_seqs: 1, status_hold: 20 * MS, ..Options::default() };
                let server = Server::start(options).await;
                let mut blocker = None;
                if needs_queue {
                    // By all that is known it ends at once; then it doesn't.
                    let mut stalling = streaming("stall 400");
                    stalling["max_tokens"] = json!(8);
                    blocker = Some(Events::of(server.chat(&[], &stalling).await));
                }
                let headers = [("glm-timeout", limit)];
                if streamed {
                    let late = last_error(server.chat(&headers, &streaming(command)).await).await;
                    assert_eq!(late, json!(code), "{limit}");
                } else {
                    let plain = error(server.chat(&headers, &request(command)).await).await;
                    assert_eq!(plain, (504, json!(code)), "{limit}");
                }
                drop(blocker);
                server.until("glmserve_requests_running", 0).await;
                assert_eq!(server.metric("glmserve_streams_total{outcome=\"timeout\"}"), 1.0);
            }
        }
        let server = Server::start(Options::default()).await;
        let wrong = error(server.chat(&[("glm-timeout", "queue=soon")], &request("say x")).await).await;
        assert_eq!(wrong, (400, json!("invalid_header")));
    });
}

#[test]
fn who_shares_a_reply_gives_up_alone() {
    run(async {
        for (limit, command, code, needs_queue) in [
            ("queue=0.1", "say paused", "queue_timeout", true),
            ("first-token=0.1", "pause 1500", "first_token_timeout", false),
            ("inter-token=0.1", "stall 1500", "inter_token_timeout", false),
            ("total=0.1, queue=60", "stall 1500", "request_timeout", false),
        ] {
            let options = Options { max_num_seqs: 1, status_hold: 20 * MS, ..Options::default() };
            let server = Server::start(options).await;
            let mut blocker = None;
            if needs_queue {
                blocker = Some(Events::of(server.chat(&[], &streaming("pause 1500")).await));
            }
            let (key, own) = (("idempotency-key", "k"), ("glm-timeout", limit));
            let starter = Events::of(server.chat(&[key], &streaming(command)).await);
            let joined = server.chat(&[key, own], &request(command)).await;
            assert_eq!(error(joined).await, (504, json!(code)), "{limit}");
            let id = starter.stream_id();
            let read = server.get_stream(&id, &[own, ("prefer", "wait=0")]).await;
            assert_eq!(read.status(), 200);
            let read = read.text().await.unwrap();
            // Its error is no event of the reply, so it has no id from which somebody could go on.
            let (before, end) = read.rsplit_once("\n\ndata: {\"error\"").unwrap_or(("", &read));
            assert!(
                end.contains(code) && end.contains("own") && end.ends_with("\n\ndata: [DONE]\n\n"),
                "{read}"
            );
            assert!(!before.contains("error") && !end.contains("id: "), "{read}");
            assert_eq!(complete_text(&starter.rest().await), "paused", "{limit}");
            drop(blocker);
        }
    });
}

#[test]
fn the_servers_own_limits_hold_and_a_header_cannot_lengthen_them() {
    run(async {
        let time_limits = TimeLimits { total: Some(100 * MS), ..TimeLimits::default() };
        let server = Server::start(Options { time_limits, ..Options::default() }).await;
        let answer = error(server.chat(&[("glm-timeout", "total=60")], &request("slow 230")).await).await;
        assert_eq!(answer, (504, json!("request_timeout")));
    });
}

#[test]
fn a_deadline_that_cannot_be_met_is_refused_at_once() {
    run(async {
        let server = Server::start(Options::default()).await;
        for _ in 0..3 {
            server.chat(&[], &request("pause 300")).await;
        }
        let start = Instant::now();
        let response = server.chat(&[("glm-timeout", "first-token=0.001")], &request("say x")).await;
        assert!(start.elapsed() < 200 * MS);
        assert!(response.headers()["retry-after"].to_str().unwrap().parse::<u32>().unwrap() >= 1);
        assert_eq!(error(response).await, (429, json!("deadline_unmeetable")));
    });
}

#[test]
fn a_queue_that_is_too_long_is_refused_at_once() {
    run(async {
        let server = Server::start(Options { max_num_seqs: 1, ..Options::default() }).await;
        server.chat(&[], &request("slow 20")).await;
        let _blocker = Events::of(server.chat(&[], &streaming("slow 230")).await);
        let response = server.chat(&[("glm-timeout", "queue=0.01")], &request("say x")).await;
        assert!(response.headers()["retry-after"].to_str().unwrap().parse::<u32>().unwrap() >= 1);
        assert_eq!(error(response).await, (429, json!("queue_timeout_unmeetable")));
        let patient = server.chat(&[("glm-timeout", "queue=60")], &request("say x")).await;
        assert_eq!(patient.status(), 200);
    });
}

#[test]
fn headers_wait_for_the_first_token_or_the_hold() {
    run(async {
        let server = Server::start(Options { status_hold: 100 * MS, ..Options::default() }).await;
        assert_eq!(error(server.chat(&[], &streaming("late 20")).await).await.0, 500);
        let start = Instant::now();
        let late = server.chat(&[], &streaming("late 400")).await;
        assert!(start.elapsed() < 300 * MS, "{:?}", start.elapsed());
        assert_eq!(last_error(late).await, "model_failed");
        let longer = server.chat(&[("prefer", "wait=5")], &streaming("late 400")).await;
        assert_eq!(error(longer).await.0, 500);
        let start = Instant::now();
        let ok = server.chat(&[("prefer", "wait=5")], &streaming("say hi")).await;
        assert!(start.elapsed() < 90 * MS, "the first token ends the hold: {:?}", start.elapsed());
        assert_eq!(ok.headers()["preference-applied"], "wait=5");
        assert_eq!(complete_text(&Events::of(ok).rest().await), "hi");
    });
}

#[test]
fn heartbeats_say_how_far_a_request_is() {
    run(async {
        let options =
            Options { max_num_seqs: 1, status_hold: 10 * MS, comment_period: 40 * MS, ..Options::default() };
        let server = Server::start(options).await;
        let _blocker = Events::of(server.chat(&[], &streaming("slow 200")).await);
        let mut events = Events::of(server.chat(&[], &streaming("say hi")).await);
        let role = events.next().await.unwrap();
        assert_eq!(role.document["choices"][0]["delta"]["role"], "assistant");
        events.next().await.unwrap();
        // A later one may come between admission and the first token.
        let first = events.comments.first().unwrap().strip_prefix("keep-alive ").unwrap();
        let news: Value = serde_json::from_str(first).unwrap();
        assert_eq!(news["stage"], "waiting", "{news}");
        assert!(news["position"].is_u64(), "{news}");
    });
}

#[test]
fn an_answer_may_be_fetched_later() {
    run(async {
        let options = Options { resume_grace: 30 * MS, status_hold: 50 * MS, ..Options::default() };
        let server = Server::start(options).await;
        let later = ("prefer", "respond-async");
        let at_once = server.chat(&[later], &request("say hi")).await;
        assert_eq!(
            (at_once.status().as_u16(), &at_once.headers()["preference-applied"]),
            (200, &"respond-async".parse().unwrap())
        );
        assert_eq!(error(server.chat(&[later], &request("refuse")).await).await.0, 500);
        let response = server.chat(&[later], &request("slow 200")).await;
        assert_eq!(response.status(), 202);
        let location = response.headers()["location"].to_str().unwrap().to_owned();
        assert!(response.headers().contains_key("retry-after"));
        let id = response.headers()["glm-stream-id"].to_str().unwrap().to_owned();
        assert_eq!(location, format!("/v1/streams/{id}"));
        tokio::time::sleep(80 * MS).await;
        let not_yet = server.get_stream(&id, &[("prefer", "respond-async, wait=0")]).await;
        assert_eq!(not_yet.status(), 202, "it outlives the grace time");
        let answer: Value = server.get_stream(&id, &[]).await.json().await.unwrap();
        assert_eq!(answer["choices"][0]["message"]["content"].as_str().unwrap().len(), 200);
        let again = server.get_stream(&id, &[("prefer", "respond-async, wait=9")]).await;
        assert_eq!(again.json::<Value>().await.unwrap(), answer);
        let streamed = server.get_stream(&id, &[("accept", "text/event-stream")]).await;
        assert_eq!(complete_text(&Events::of(streamed).rest().await).len(), 200);
    });
}
