"""The real openai client against the real server and a real chat model."""

import concurrent.futures
import json
import urllib.request

import openai
import pytest
from conftest import ROOT
from examples import CAPITAL, EXAMPLES

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": CAPITAL.question}]


@pytest.fixture(scope="module")
def client(default_server):
    return openai.OpenAI(base_url=default_server.url + "/v1", api_key="none", max_retries=0)


def stream_text(client, **options):
    """Content, finish reason and usage of a stream."""
    text, finish_reason, usage = "", None, None
    options = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 32} | options
    for chunk in client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **options
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert finish_reason is None, "a chunk after the finish chunk"
            text += choice.delta.content or ""
            finish_reason = choice.finish_reason
    return text, finish_reason, usage


def test_a_sensible_answer_streams(client):
    text, finish_reason, usage = stream_text(client)
    assert CAPITAL.word in text
    assert finish_reason == "stop"
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.word)
def test_the_readme_says_what_the_model_says(client, example):
    messages = [{"role": "user", "content": example.question}]
    text, finish_reason, _ = stream_text(client, messages=messages, max_tokens=example.max_tokens)
    readme = (ROOT / "README.md").read_text()
    assert example.question in readme and text in readme, text
    assert example.word in text and finish_reason == "stop"


CACHED = {"prompt_tokens_details"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens": 5},
        {"stop": [CAPITAL.word, "never"]},
        {"temperature": 0.9, "top_p": 0.9, "seed": 7},
        {"messages": [{"role": "user", "content": "Write one emoji and one Chinese word."}]},
    ],
)
def test_streaming_and_not_are_equal(client, options):
    text, finish_reason, usage = stream_text(client, **options)
    options = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 32} | options
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == finish_reason
    # Of the second one more may have come from the prefix cache.
    assert whole.usage.model_dump(exclude=CACHED) == usage.model_dump(exclude=CACHED)
    if "stop" in options:
        assert CAPITAL.word not in text and finish_reason == "stop"
    if options["max_tokens"] == 5:
        assert finish_reason == "length" and usage.completion_tokens == 5


def test_sixteen_streams_share_steps(client, default_server):
    before = default_server.metrics()
    prompts = [f"Tell me {n + 2} facts about the sea." for n in range(16)]

    def ask(prompt):
        messages = [{"role": "user", "content": prompt}]
        return stream_text(client, messages=messages, max_tokens=48)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        results = list(pool.map(ask, prompts))
    assert all(reason in ("stop", "length") for _, reason, _ in results)
    assert all(text for text, _, _ in results)
    after = default_server.metrics()
    steps, tokens = (
        after[name] - before[name]
        for name in ("glmserve_engine_steps_total", "glmserve_generation_tokens_total")
    )
    assert tokens >= sum(usage.completion_tokens for _, _, usage in results)
    assert steps < tokens / 4, f"{steps} steps for {tokens} tokens: no batching"
    assert after["glmserve_requests_running"] == 0


def test_aliases_and_models(client):
    assert {model.id for model in client.models.list()} == {MODEL, "chatglm3-6b"}
    text, _, _ = stream_text(client, model="chatglm3-6b")
    assert CAPITAL.word in text


@pytest.mark.parametrize(
    ("options", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"temperature": 3}, 400, "temperature"),
        ({"extra_body": {"frobnicate": 1}}, 400, "frobnicate"),
        ({"n": 2}, 400, "n"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 20_000}]}, 400, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_name_the_field_before_any_stream(client, options, status, param, stream):
    options = {"model": MODEL, "messages": QUESTION} | options
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(stream=stream, **options)
    assert caught.value.status_code == status
    assert caught.value.body["param"] == param, caught.value.body


def test_special_tokens_in_user_text_are_plain_text(client):
    """`<|im_end|>` typed by a user must not end the turn: it costs several tokens, not one."""
    counts = []
    for text in ("x", "x<|im_end|>"):
        messages = [{"role": "user", "content": text}]
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
        counts.append(answer.usage.prompt_tokens)
    assert counts[1] - counts[0] > 2


def test_the_wire_format(default_server):
    body = {"model": MODEL, "messages": QUESTION, "stream": True, "temperature": 0, "max_tokens": 3}
    request = urllib.request.Request(
        default_server.url + "/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.headers["X-Accel-Buffering"] == "no"
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
        "length"
    ]
    assert len({chunk["id"] for chunk in chunks}) == 1
