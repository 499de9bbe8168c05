//! Chat completions end to end: what a client gets for each kind of reply and each kind of mistake.

mod support;

use serde_json::{Value, json};
use support::events::{Events, complete_text};
use support::{Options, Server, model_dir, request, run};

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
const GLM: &str = ",\"glm\":{\"completion_tokens\":8,\"text_sha256\":\"HASH\"}";

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
            (json!({"max_tokens": 1}), "", "length"),
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
        server.until("glmserve_streams_total{outcome=\"stop\"}", 10).await;
        server.until("glmserve_streams_total{outcome=\"length\"}", 6).await;
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
fn mistakes_are_refused_by_name_before_any_stream() {
    run(async {
        let server = Server::start(Options::default()).await;
        let message = |message: Value| json!({"messages": [message]});
        let cases = [
            (json!({"model": "gpt-4"}), 404, "model", "model_not_found"),
            (json!({"model": null}), 400, "model", "invalid_value"),
            (json!({"messages": []}), 400, "messages", "invalid_value"),
            (json!({"messages": null}), 400, "messages", "invalid_value"),
            (json!({"temperature": 3}), 400, "temperature", "invalid_value"),
            (json!({"temperature": "warm"}), 400, "temperature", "invalid_value"),
            (json!({"top_p": 0}), 400, "top_p", "invalid_value"),
            (json!({"top_k": -2}), 400, "top_k", "invalid_value"),
            (json!({"max_tokens": 0}), 400, "max_tokens", "invalid_value"),
            (
                json!({"max_tokens": 5, "max_completion_tokens": 6}),
                400,
                "max_completion_tokens",
                "invalid_value",
            ),
            (json!({"max_tokens": 1000}), 400, "max_tokens", "context_length_exceeded"),
            (json!({"max_completion_tokens": 1000}), 400, "max_completion_tokens", "context_length_exceeded"),
            (json!({"min_tokens": 9, "max_tokens": 8}), 400, "min_tokens", "invalid_value"),
            (json!({"stop": ""}), 400, "stop", "invalid_value"),
            (json!({"stop": ["a", "b", "c", "d", "e"]}), 400, "stop", "invalid_value"),
            (json!({"logit_bias": {"x": 1}}), 400, "logit_bias.x", "invalid_value"),
            (json!({"logit_bias": {"1": 101}}), 400, "logit_bias", "invalid_value"),
            (json!({"stream_options": {}, "stream": false}), 400, "stream_options", "invalid_value"),
            (json!({"n": 2}), 400, "n", "unsupported_parameter"),
            (json!({"tools": [{"type": "function"}]}), 400, "tools", "unsupported_parameter"),
            (json!({"frobnicate": 1}), 400, "frobnicate", "unknown_parameter"),
            (
                message(json!({"role": "tool", "content": "x"})),
                400,
                "messages[0].role",
                "unsupported_parameter",
            ),
            (message(json!({"role": "king", "content": "x"})), 400, "messages[0].role", "invalid_value"),
            (message(json!({"role": "user"})), 400, "messages[0].content", "invalid_value"),
            (
                message(json!({"role": "user", "content": [{"type": "text"}]})),
                400,
                "messages[0].content[0]",
                "invalid_value",
            ),
            (
                message(json!({"role": "user", "content": [{"type": "image"}]})),
                400,
                "messages[0].content[0].type",
                "unsupported_parameter",
            ),
            (
                message(json!({"role": "user", "content": "long ".repeat(60)})),
                400,
                "messages",
                "context_length_exceeded",
            ),
            (
                message(json!({"role": "user", "content": "x".repeat(50_000)})),
                400,
                "messages",
                "context_length_exceeded",
            ),
        ];
        for (change, status, param, code) in cases {
            for stream in [false, true] {
                let mut body = request("say hi");
                body["stream"] = json!(stream);
                body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
                let (got, answer) = server.post(body).await;
                assert_eq!(got, status, "{change}: {answer}");
                let error = &answer["error"];
                assert_eq!(
                    (&error["param"], &error["code"]),
                    (&json!(param), &json!(code)),
                    "{change}: {answer}"
                );
                assert_eq!(error["type"], "invalid_request_error");
            }
        }
        assert!(
            server.state.metrics.encode().unwrap().contains("refused_total{code=\"unknown_parameter\"} 2")
        );
    });
}

#[test]
fn fields_without_effect_parts_and_aliases_are_accepted() {
    run(async {
        let server = Server::start(Options::default()).await;
        let body = json!({"model": "alias/of", "temperature": 0, "n": 1, "user": "me", "logprobs": false, "store": false,
            "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "seed": -1, "stop": [],
            "messages": [{"role": "developer", "content": "be"},
                {"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "yes"}]}]});
        let (status, answer) = server.post(body).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(
            (&answer["choices"][0]["message"]["content"], &answer["model"]),
            (&json!("yes"), &json!("alias/of"))
        );
        assert_eq!(answer["choices"][0]["message"]["refusal"], Value::Null);
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
fn a_priority_is_taken_in_its_range_only() {
    run(async {
        let server = Server::start(Options::default()).await;
        let with = |priority: i64| {
            let mut body = request("say x");
            body["priority"] = json!(priority);
            body
        };
        assert_eq!(server.post(with(-100)).await.0, 200);
        for priority in [101, i64::MAX] {
            let (status, error) = server.post(with(priority)).await;
            assert_eq!((status, &error["error"]["param"]), (400, &json!("priority")), "{error}");
        }
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

#[test]
fn what_rounds_cannot_say_names_the_message() {
    run(async {
        let server = Server::start(Options { folder: model_dir::chatglm2, ..Options::default() }).await;
        let mut body = request("hi");
        body["messages"] = json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]);
        let (status, body) = server.post(body).await;
        let expected = json!({"message": "messages[1]: ChatGLM2 knows questions and answers in turn, after at most \
            one system message", "type": "invalid_request_error", "param": "messages[1].role", "code": "invalid_value"});
        assert_eq!((status, &body["error"]), (400, &expected));
    });
}
