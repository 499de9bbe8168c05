//! Requests end to end: which fields are taken, which are cut, and what is refused before any stream.

use crate::support::{Options, Server, model_dir, request, run};
use serde_json::{Value, json};

#[test]
fn limits_beyond_the_room_are_cut_to_it_and_the_answer_says_so() {
    run(async {
        let server = Server::start(Options::default()).await;
        for options in [
            json!({}),
            json!({"max_tokens": 20000}),
            json!({"max_completion_tokens": u64::MAX, "min_tokens": 20000}),
            json!({"max_tokens": null, "max_completion_tokens": -1, "min_tokens": 1e9}),
        ] {
            let mut body = request("flood 900");
            body.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
            let (status, whole) = server.post(body.clone()).await;
            assert_eq!(status, 200, "{whole}");
            assert_eq!(whole["choices"][0]["finish_reason"], "length", "{options}");
            assert_eq!(whole["usage"]["total_tokens"], 256, "{options}");
            assert_eq!(whole["glm"]["max_tokens"], whole["usage"]["completion_tokens"], "{options}");
            let lines = server.stream(body).await;
            let [.., finish, _] = lines.as_slice() else { panic!("{lines:?}") };
            let finish: Value = serde_json::from_str(&finish["data: ".len()..]).unwrap();
            assert_eq!(finish["choices"][0]["finish_reason"], "length");
            assert_eq!(finish["glm"], whole["glm"]);
        }
        let mut body = request("flood 900");
        body["max_tokens"] = json!(7);
        assert_eq!(server.post(body).await.1["glm"]["max_tokens"], 7);
    });
}

#[test]
fn a_prompt_beyond_the_context_is_refused_in_the_words_that_client_libraries_know() {
    run(async {
        let server = Server::start(Options::default()).await;
        for (len, words) in [
            (
                250,
                "However, your messages resulted in 257 tokens. The prompt is too long. Please reduce the length of the messages.",
            ),
            (
                249,
                "resulted in 256 tokens. The prompt is too long. Please reduce the length of the messages. A reply needs at least one token more.",
            ),
            (50_000, "However, your messages resulted in at least "),
        ] {
            let (status, body) = server.post(request(&"x".repeat(len))).await;
            let error = &body["error"];
            assert_eq!((status, &error["code"]), (400, &json!("context_length_exceeded")));
            let message = error["message"].as_str().unwrap();
            assert!(message.starts_with("This model's maximum context length is 256 tokens. "), "{message}");
            assert!(message.contains(words), "{message}");
        }
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
            (json!({"top_p": -1}), 400, "top_p", "invalid_value"),
            (json!({"min_p": 1.5}), 400, "min_p", "invalid_value"),
            (json!({"top_k": -2}), 400, "top_k", "invalid_value"),
            (json!({"max_tokens": 0}), 400, "max_tokens", "invalid_value"),
            (json!({"min_tokens": 9, "max_tokens": 8}), 400, "min_tokens", "invalid_value"),
            (json!({"stop": vec!["a"; 65]}), 400, "stop", "invalid_value"),
            (json!({"stop_token_ids": [0, 1 << 20]}), 400, "stop_token_ids[1]", "invalid_value"),
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

        // What the authors' own clients, chat front ends and SDKs send besides.
        let body = json!({"model": "test-model", "do_sample": false, "temperature": 2, "top_p": 0, "min_p": 0.1, "stop": "",
            "thinking": {"type": "disabled"}, "user_id": "u", "sensitive_word_check": {}, "metadata": "",
            "chat_template_kwargs": {"enable_thinking": false}, "mirostat": 0, "tfs_z": 1, "max_tokens": 200.0,
            "messages": [{"role": "user", "content": "hi", "id": "m1"},
                {"role": "assistant", "content": null, "reasoning_content": "so", "annotations": [], "tool_calls": []},
                {"role": "user", "content": "say yes", "tool_call_id": "", "cache_control": {"type": "ephemeral"}}]});
        let (status, answer) = server.post(body.clone()).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["choices"][0]["message"]["content"], "yes");
        assert_eq!(server.send(format!("\u{FEFF}{body}")).await.status(), 200, "a byte order mark");
    });
}

#[test]
fn a_body_that_is_wrong_in_the_middle_is_refused_whatever_follows() {
    run(async {
        let server = Server::start(Options::default()).await;
        for (body, code) in [
            (r#"{"model": "test-model", "model": "test-model"}"#, "invalid_value"),
            (r#"{"model": "test-model", "n": 2, "x"#, "unsupported_parameter"),
            (
                r#"{"model": "test-model", "messages": [{"role": "user", "content": "\ud800"}]}"#,
                "invalid_json",
            ),
            ("", "invalid_json"),
            ("[[[[[[", "invalid_value"),
        ] {
            let response = server.send(body.to_owned()).await;
            assert_eq!(response.status(), 400);
            assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], code, "{body}");
        }
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
