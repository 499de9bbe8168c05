//! Chat completions end to end: what a client gets for each kind of reply and each kind of mistake.

use crate::support::events::{Events, complete_text};
use crate::support::{Options, Server, model_dir, request, run};
use serde_json::{Value, json};

/// Content, finish reason and usage of a stream's lines.
fn joined(lines: &[String]) -> (String, Value, Value) {
    assert_eq!(lines.last().map(String::as_str), Some("data: [DONE]"), "{lines:?}");
    let (mut content, mut reason, mut usage) = (String::new(), Value::Null, Value::Null);
    for line in &lines[..lines.len() - 1] {
        let chunk: Value = serde_json::from_str(line.strip_prefix("data: ").unwrap()).unwrap();
        assert!(chunk.get("error").is_none(), "{chunk}");
        if !chunk["usage"].is_null() {
            usage = chunk["usage"].clone();
        }
        for choice in chunk["choices"].as_array().unwrap() {
            assert_eq!(reason, Value::Null, "a choice after the finish");
            content += choice["delta"]["content"].as_str().unwrap_or_default();
            reason = choice["finish_reason"].clone();
        }
    }
    (content, reason, usage)
}

#[test]
fn replies_of_any_length_are_complete_and_equal_in_both_forms() {
    run(async {
        let server = Server::start(Options::default()).await;
        let mut commands: Vec<String> = (0..=16)
            .map(|n| format!("say {}", "1+1=2…你好，世界abcdé"[..].chars().take(n).collect::<String>()))
            .collect();
        commands.extend(["say 你好👋🏽!", "bytes 61 F0 9F 98 62 E4", "bytes FF", "nothing"].map(str::to_owned));
        for command in commands {
            let mut body = request(&command);
            let (status, whole) = server.post(body.clone()).await;
            assert_eq!(status, 200, "{whole}");
            body["stream_options"] = json!({"include_usage": true});
            let (content, reason, usage) = joined(&server.stream(body.clone()).await);
            body["stream"] = json!(true);
            let events = Events::of(server.chat(&[], &body).await).rest().await;
            assert_eq!(complete_text(&events), content, "{command}");
            assert_eq!(events[events.len() - 2].document["glm"], whole["glm"]);
            assert_eq!(whole["choices"][0]["message"]["content"], content, "{command}");
            assert_eq!(whole["choices"][0]["finish_reason"], reason, "{command}");
            assert_eq!(counts(&whole["usage"]), counts(&usage), "{command}");
            assert_eq!(reason, "stop");
            if let Some(text) = command.strip_prefix("say ") {
                assert_eq!(content, text);
            }
        }
    });
}

/// `好!` in UTF-8, hashed elsewhere.
const HASH: &str = "a4c257928bb6db5924e1a3f7b2b03be265f2b634df9fca3b0cd1aba091bace10";
/// 256 tokens of the context, 15 of them the prompt's.
const GLM: &str = ",\"glm\":{\"completion_tokens\":8,\"max_tokens\":241,\"text_sha256\":\"HASH\"}";

#[test]
fn the_lines_of_a_stream() {
    run(async {
        let server = Server::start(Options::default()).await;
        let lines = async |options: Value| {
            let mut body = request("say 好!");
            body["stream_options"] = options;
            let lines = server.stream(body).await;
            let head: Value = serde_json::from_str(&lines[0]["data: ".len()..]).unwrap();
            let id = head["id"].as_str().unwrap().to_owned();
            assert!(id.starts_with("chatcmpl-") && id.len() == 41, "{id}");
            let created = format!("\"created\":{}", head["created"]);
            lines
                .into_iter()
                .map(|l| l.replace(&id, "ID").replace(&created, "\"created\":0"))
                .map(|l| l.replace(HASH, "HASH"))
                .map(|l| l.replace(&server.state.model.fingerprint, "FP"))
                .collect::<Vec<_>>()
        };
        let chunk = |rest: &str| {
            format!(
                "data: {{\"id\":\"ID\",\"object\":\"chat.completion.chunk\",\"created\":0,\"model\":\"test-model\",\
                 \"system_fingerprint\":\"FP\",{rest}}}"
            )
        };
        let choice = |delta: &str, reason: &str, usage: &str| {
            chunk(&format!(
                "\"choices\":[{{\"index\":0,\"delta\":{delta},\"logprobs\":null,\"finish_reason\":{reason}}}]{usage}"
            ))
        };
        let plain = [
            choice(r#"{"role":"assistant","content":""}"#, "null", ""),
            choice(r#"{"content":"好"}"#, "null", ""),
            choice(r#"{"content":"!"}"#, "null", ""),
            choice("{}", r#""stop""#, GLM),
            "data: [DONE]".to_owned(),
        ];
        assert_eq!(lines(json!(null)).await, plain);

        let null = ",\"usage\":null";
        // 3 specials and 2 of the empty line, 9 of the text with its leading space, and the reply's role.
        let usage = |n: u32| {
            format!(
                "\"usage\":{{\"prompt_tokens\":15,\"completion_tokens\":{n},\"total_tokens\":{},\"prompt_tokens_details\":{{\"cached_tokens\":0}}}}",
                15 + n
            )
        };
        let with_usage = [
            choice(r#"{"role":"assistant","content":""}"#, "null", null),
            choice(r#"{"content":"好"}"#, "null", null),
            choice(r#"{"content":"!"}"#, "null", null),
            choice("{}", r#""stop""#, &format!("{null}{GLM}")),
            chunk(&format!("\"choices\":[],{}", usage(8))),
            "data: [DONE]".to_owned(),
        ];
        assert_eq!(lines(json!({"include_usage": true})).await, with_usage);

        let running = |n| format!(",{}", usage(n));
        let continuous = [
            choice(r#"{"role":"assistant","content":""}"#, "null", &running(0)),
            choice(r#"{"content":"好"}"#, "null", &running(6)),
            choice(r#"{"content":"!"}"#, "null", &running(7)),
            choice("{}", r#""stop""#, &(running(8) + GLM)),
            chunk(&format!("\"choices\":[],{}", usage(8))),
            "data: [DONE]".to_owned(),
        ];
        assert_eq!(lines(json!({"include_usage": true, "continuous_usage_stats": true})).await, continuous);
    });
}

#[test]
fn stop_strings_and_length_end_a_reply_alike_in_both_forms() {
    run(async {
        let server = Server::start(Options::default()).await;
        let cases = [
            (json!({"stop": "cd"}), "ab", "stop"),
            // Three tokens come before the text.
            (json!({"stop": "d", "min_tokens": 6}), "abc", "stop"),
            (json!({"stop": "d", "min_tokens": 7}), "abcdefgh", "stop"),
            (json!({"stop": ["zz", "f"]}), "abcde", "stop"),
            (json!({"stop": ["gh!"]}), "abcdefgh", "stop"),
            (json!({"max_tokens": 5}), "ab", "length"),
            (json!({"max_completion_tokens": 5, "max_tokens": 5}), "ab", "length"),
            // The smaller one counts.
            (json!({"max_completion_tokens": 5.0, "max_tokens": 6}), "ab", "length"),
            (json!({"max_completion_tokens": -1, "max_tokens": 1}), "", "length"),
            // An id of the test's vocabulary is three more than its byte.
            (json!({"stop_token_ids": [b'g' + 3, b'd' + 3]}), "abc", "stop"),
            (json!({"stop": (0..64).map(|i| format!("e{i}f")).collect::<Vec<_>>()}), "abcdefgh", "stop"),
            (json!({"stop": ["", "f"]}), "abcde", "stop"),
        ];
        for (options, expected, expected_reason) in cases {
            let mut body = request("say abcdefgh");
            body.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
            let (status, whole) = server.post(body.clone()).await;
            assert_eq!(status, 200, "{whole}");
            body["stream_options"] = json!({"include_usage": true});
            let (content, reason, usage) = joined(&server.stream(body).await);
            assert_eq!((content.as_str(), reason.as_str()), (expected, Some(expected_reason)), "{options}");
            assert_eq!(whole["choices"][0]["message"]["content"], expected);
            assert_eq!(whole["choices"][0]["finish_reason"], expected_reason);
            assert_eq!(counts(&whole["usage"]), counts(&usage));
        }
        server.until("glmserve_requests_running", 0).await;
        server.until("glmserve_streams_total{outcome=\"stop\"}", 16).await;
        server.until("glmserve_streams_total{outcome=\"length\"}", 8).await;
        server.until("glmserve_empty_streams_total", 2).await;
    });
}

#[test]
fn a_failure_has_a_real_status_or_an_error_event() {
    run(async {
        let server = Server::start(Options::default()).await;
        let (status, body) = server.post(request("fail")).await;
        assert_eq!((status, &body["error"]["code"]), (500, &json!("model_failed")));
        assert_eq!(body["error"]["type"], "server_error");
        let lines = server.stream(request("fail")).await;
        let [.., error, done] = lines.as_slice() else { panic!("{lines:?}") };
        assert_eq!(done, "data: [DONE]");
        let error: Value = serde_json::from_str(&error["data: ".len()..]).unwrap();
        assert_eq!(error["error"]["code"], "model_failed");
        assert!(lines[1].contains("\"content\":\"x\""), "what came before is delivered: {lines:?}");
        let (status, _) = server.post(request("say ok")).await;
        assert_eq!(status, 200, "others go on");
    });
}

#[test]
fn a_reply_that_outgrows_its_log_is_an_error_and_frees_the_engine() {
    run(async {
        let server = Server::start(Options { max_reply_bytes: 4, ..Options::default() }).await;
        let (status, body) = server.post(request("slow 100")).await;
        assert_eq!((status, &body["error"]["code"]), (500, &json!("reply_too_large")));
        server.until("glmserve_requests_running", 0).await;
    });
}

#[test]
fn a_user_who_writes_special_tokens_writes_text() {
    run(async {
        let server = Server::start(Options::default()).await;
        let (_, answer) = server.post(request("say <|assistant|><|user|>")).await;
        assert_eq!(answer["choices"][0]["message"]["content"], "<|assistant|><|user|>");
    });
}

/// A usage without what depends on who asked before.
fn counts(usage: &Value) -> [&Value; 3] {
    ["prompt_tokens", "completion_tokens", "total_tokens"].map(|name| &usage[name])
}

#[test]
fn what_was_computed_before_is_counted_and_not_computed_again() {
    run(async {
        let server = Server::start(Options::default()).await;
        let cached = async |text: &str| {
            let (status, reply) = server.post(request(text)).await;
            assert_eq!(status, 200, "{reply}");
            assert_eq!(reply["choices"][0]["message"]["content"], text.split_once(' ').unwrap().1);
            let usage = &reply["usage"];
            (
                usage["prompt_tokens"].as_u64().unwrap(),
                usage["prompt_tokens_details"]["cached_tokens"].clone(),
            )
        };
        let text = format!("say {}", "long ".repeat(10).trim_end());
        let (num_tokens, before) = cached(&text).await;
        assert_eq!(
            (before, cached(&text).await),
            (json!(0), (num_tokens, json!((num_tokens - 1) / 16 * 16)))
        );
        assert_eq!(server.metric("glmserve_prefix_cache_queries_total") as u64, 2 * num_tokens);
        assert_eq!(server.metric("glmserve_prefix_cache_hits_total") as u64, (num_tokens - 1) / 16 * 16);
    });
}

#[test]
fn a_base_model_is_served_and_does_not_chat() {
    run(async {
        let server = Server::start(Options { folder: model_dir::base, ..Options::default() }).await;
        let (status, body) = server.post(request("say hi")).await;
        let error = &body["error"];
        assert_eq!(
            (status, &error["code"], &error["param"]),
            (400, &json!("chat_not_supported"), &json!("model"))
        );
        assert!(error["message"].as_str().unwrap().contains("no chat format"), "{error}");
    });
}
