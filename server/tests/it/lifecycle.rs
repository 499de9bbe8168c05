//! The server's edges end to end: routes, keys, overload, clients that vanish, shutdown.

use std::time::Duration;

use crate::support::{Options, Server, Starting, read_all, request, run, streaming};
use glmserve::api_keys::ApiKeys;
use serde_json::{Value, json};
use tokio::sync::oneshot;

#[test]
fn models_health_and_unknown_routes() {
    run(async {
        let server = Server::start(Options::default()).await;
        let json = async |path: &str| {
            let (status, text) = server.get(path).await;
            (status, serde_json::from_str::<Value>(&text).unwrap())
        };
        let (status, models) = json("/v1/models").await;
        assert_eq!(
            (status, &models["data"][0]["id"], &models["data"][1]["id"]),
            (200, &json!("test-model"), &json!("alias/of"))
        );
        assert_eq!(models["data"][0]["max_model_len"], 256);
        assert_eq!(json("/v1/models/alias/of").await.1["id"], "alias/of");
        let (status, error) = json("/v1/models/nope").await;
        assert_eq!((status, &error["error"]["code"]), (404, &json!("model_not_found")));
        for path in ["/nothing", "/v1/nothing"] {
            let (status, error) = json(path).await;
            assert_eq!((status, &error["error"]["code"]), (404, &json!("unknown_url")), "{path}");
        }
        let (status, error) = json("/v1/chat/completions").await;
        assert_eq!((status, &error["error"]["code"]), (405, &json!("method_not_allowed")));
        for path in ["/livez", "/readyz", "/health"] {
            assert_eq!(json(path).await.0, 200, "{path}");
        }
        assert!(server.get("/metrics").await.1.contains("glmserve_build_info{"));
    });
}

#[test]
fn large_and_broken_bodies_are_refused_in_openai_shape() {
    run(async {
        let server = Server::start(Options { max_body_bytes: 1000, ..Options::default() }).await;
        let (status, error) = server.post(request(&"x".repeat(1000))).await;
        assert_eq!((status, &error["error"]["code"]), (413, &json!("body_too_large")));
        for body in ["", "{", "\u{FEFF}{"] {
            let response = server.send(body).await;
            assert_eq!(response.status(), 400);
            let error: Value = response.json().await.unwrap();
            assert_eq!(error["error"]["code"], "invalid_json");
        }
    });
}

#[test]
fn keys_guard_v1_only() {
    run(async {
        let path = std::env::temp_dir().join(format!("glmserve-keys-{}", std::process::id()));
        std::fs::write(&path, "# team\nsecret\n").unwrap();
        let keys = ApiKeys::load(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        let server = Server::start(Options { keys: Some(keys), ..Options::default() }).await;
        assert_eq!(server.get("/readyz").await.0, 200);
        let (status, text) = server.get("/v1/models").await;
        assert_eq!(status, 401);
        assert!(text.contains("invalid_api_key"), "{text}");
        let client = reqwest::Client::new();
        for (key, status) in [("secret", 200), ("secre", 401), ("", 401), ("# team", 401)] {
            let url = format!("http://{}/v1/models", server.address);
            let response =
                client.get(url).header("authorization", format!("Bearer {key}")).send().await.unwrap();
            assert_eq!(response.status(), status, "{key}");
        }
        assert!(server.state.metrics.encode().unwrap().contains("refused_total{code=\"invalid_api_key\"} 4"));
    });
}

#[test]
fn queued_clients_that_vanish_leave_the_queue_empty() {
    run(async {
        let server = Server::start(Options { max_num_seqs: 2, ..Options::default() }).await;
        for stream in [true, false] {
            let mut body = request("slow 10000");
            body["stream"] = json!(stream);
            body["ignore_eos"] = json!(true);
            let mut running = Vec::new();
            for _ in 0..2 {
                running.push(server.open(&body).await);
            }
            server.until("glmserve_requests_running", 2).await;
            let mut queued = Vec::new();
            for _ in 0..24 {
                queued.push(server.open(&body).await);
            }
            server.until("glmserve_requests_waiting", 24).await;
            drop(queued);
            server.until("glmserve_requests_waiting", 0).await;
            drop(running);
            server.until("glmserve_requests_running", 0).await;
            server.until("glmserve_kv_cache_usage_ratio", 0).await;
        }
        server.until("glmserve_streams_total{outcome=\"abort\"}", 52).await;
        server.until("glmserve_streams_total{outcome=\"error\"}", 0).await;
    });
}

#[test]
fn overload_is_an_answer() {
    run(async {
        let server =
            Server::start(Options { max_num_seqs: 1, max_num_waiting: 1, ..Options::default() }).await;
        let mut held = Vec::new();
        for _ in 0..2 {
            held.push(server.open(&streaming("slow 200")).await);
        }
        server.until("glmserve_requests_waiting", 1).await;
        let response = server.send(request("say hi").to_string()).await;
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "1");
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["code"], "queue_full");
        assert_eq!(server.get("/readyz").await.0, 200);
        assert!(server.state.metrics.encode().unwrap().contains("refused_total{code=\"queue_full\"} 1"));
    });
}

#[test]
fn a_signal_lets_running_streams_end_and_refuses_new_ones() {
    run(async {
        let server = Server::start(Options::default()).await;
        let socket = server.open(&streaming("slow 150")).await;
        server.until("glmserve_requests_running", 1).await;
        server.signals.send(()).await.unwrap();
        while server.get("/readyz").await.0 != 503 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert_eq!(server.get("/livez").await.0, 200);
        let response = server.send(request("say hi").to_string()).await;
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["retry-after"], "5");
        assert_eq!(response.headers()["connection"], "close");
        let text = read_all(socket).await;
        assert!(text.contains("\"finish_reason\":\"stop\"") && text.contains("data: [DONE]"), "{text}");
        server.ended().await.unwrap();
    });
}

#[test]
fn a_stream_that_outlasts_the_drain_time_ends_with_a_typed_error() {
    run(async {
        let server =
            Server::start(Options { drain_timeout: Duration::from_millis(50), ..Options::default() }).await;
        let socket = server.open(&streaming("slow 220")).await;
        let plain = server.open(&request("slow 220")).await;
        server.until("glmserve_requests_running", 2).await;
        server.signals.send(()).await.unwrap();
        let text = read_all(socket).await;
        assert!(text.contains("\"code\":\"shutting_down\"") && text.contains("data: [DONE]"), "{text}");
        let text = read_all(plain).await;
        assert!(text.starts_with("HTTP/1.1 503") && text.contains("shutting_down"), "{text}");
        server.ended().await.unwrap();
    });
}

#[test]
fn a_second_signal_ends_the_drain_and_streams_hear_of_it() {
    run(async {
        let server = Server::start(Options::default()).await;
        let socket = server.open(&streaming("slow 220")).await;
        server.until("glmserve_delivered_time_to_first_token_seconds_count", 1).await;
        server.signals.send(()).await.unwrap();
        server.signals.send(()).await.unwrap();
        let text = read_all(socket).await;
        assert!(text.contains("\"code\":\"shutting_down\"") && text.contains("data: [DONE]"), "{text}");
        tokio::time::timeout(Duration::from_secs(2), server.ended()).await.expect("at once").unwrap();
    });
}

#[test]
fn while_the_model_is_loaded_requests_are_refused_at_once() {
    run(async {
        let (release, gate) = oneshot::channel::<()>();
        let starting = Starting::begin(Options::default(), async { gate.await.unwrap() });
        let client = reqwest::Client::new();
        let url = |path: &str| format!("http://{}{path}", starting.address);
        for (path, status, words) in [
            ("/livez", 200, r#"{"status":"alive"}"#),
            ("/metrics", 200, "refused_total{code=\"loading\"} 0"),
            ("/startupz", 503, r#"{"status":"loading"}"#),
            ("/readyz", 503, r#"{"status":"loading"}"#),
            ("/health", 503, r#"{"status":"loading"}"#),
            ("/v1/models", 503, r#""code":"loading""#),
            ("/", 503, r#""code":"loading""#),
        ] {
            let response = client.get(url(path)).send().await.unwrap();
            assert_eq!(response.status(), status, "{path}");
            assert_eq!(response.headers().contains_key("retry-after"), status == 503, "{path}");
            let text = response.text().await.unwrap();
            assert!(text.contains(words), "{path}: {text}");
        }
        let refused = client.post(url("/v1/chat/completions")).json(&request("say hi")).send().await.unwrap();
        assert_eq!(
            (refused.status().as_u16(), &refused.headers()["retry-after"]),
            (503, &"5".parse().unwrap())
        );
        let error: Value = refused.json().await.unwrap();
        assert_eq!(error["error"]["code"], "loading");

        release.send(()).unwrap();
        let server = starting.ready().await;
        for path in ["/startupz", "/readyz", "/health", "/livez"] {
            assert_eq!(server.get(path).await.0, 200, "{path}");
        }
        assert_eq!(server.post(request("say hi")).await.0, 200);
        assert_eq!(server.metric("glmserve_http_requests_refused_total{code=\"loading\"}"), 3.0);
    });
}

#[test]
fn a_signal_ends_a_server_that_is_loading() {
    run(async {
        let starting = Starting::begin(Options::default(), std::future::pending());
        starting.signals.send(()).await.unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(20), starting.task).await;
        ended.expect("the server ends").unwrap().unwrap();
    });
}

#[test]
fn figures_are_of_users_requests_only() {
    run(async {
        let server = Server::start(Options::default()).await;
        // The known answer was generated twice.
        assert!(server.metric("glmserve_engine_steps_total") > 0.0);
        for name in [
            "glmserve_prompt_tokens_total",
            "glmserve_generation_tokens_total",
            "glmserve_request_queue_seconds_count",
            "glmserve_step_duration_seconds_count",
            "glmserve_time_to_first_token_seconds_count",
            "glmserve_prefix_cache_queries_total",
        ] {
            assert_eq!(server.metric(name), 0.0, "{name}");
        }
        let (_, reply) = server.post(request("say hi")).await;
        let usage = |name: &str| reply["usage"][name].as_u64().unwrap();
        // The last step is reported after its tokens are sent.
        server.until("glmserve_prompt_tokens_total", usage("prompt_tokens")).await;
        server.until("glmserve_generation_tokens_total", usage("completion_tokens")).await;
        assert_eq!(server.metric("glmserve_request_queue_seconds_count"), 1.0);
        assert_eq!(server.metric("glmserve_time_to_first_token_seconds_count"), 1.0);
        // The first token has no gap before it.
        let gaps = server.metric("glmserve_inter_token_latency_seconds_count");
        assert_eq!(gaps, (usage("completion_tokens") - 1) as f64);
    });
}
