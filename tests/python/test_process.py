"""The server as a process: start, bad options, signals, vanished clients, overload, metrics."""

import concurrent.futures
import json
import os
import shutil
import signal
import socket
import subprocess

import openai
import pytest
from conftest import DEFAULT_MODEL, GLMSERVE, ROOT

MODEL = "smollm2-135m-instruct"

LONG = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 4000, "ignore_eos": True}


def run(*arguments, **environment):
    return subprocess.run(
        [GLMSERVE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


def test_a_port_that_kubernetes_injects_is_explained(tiny_model):
    result = run("serve", "--model", tiny_model, GLMSERVE_PORT="tcp://10.0.0.1:8000")
    assert result.returncode != 0
    assert "Kubernetes" in result.stderr and "enableServiceLinks" in result.stderr


def test_help_gives_defaults_and_variables():
    result = run("serve", "--help")
    assert result.returncode == 0
    for words in ("GLMSERVE_MODEL", "GLMSERVE_PORT", "[default: 8000]", "GLMSERVE_DRAIN_TIMEOUT"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: m.update(schema_version=99), "schema_version 99"),
        (lambda m: m["geometry"].pop("num_layers"), "num_layers"),
        (lambda m: m["graph"].update(output="topk"), "topk"),
    ],
)
def test_a_folder_that_is_not_understood_is_refused(tiny_model, tmp_path, damage, words):
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "manifest.json"
    manifest = json.loads(path.read_text())
    damage(manifest)
    path.write_text(json.dumps(manifest))
    result = run("serve", "--model", tmp_path / "model", "--port", "1")
    assert result.returncode != 0 and words in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-cache-memory", "10000000"], "more than the machine's"),
        (["--max-num-seqs", "600", "--max-num-batched-tokens", "512"], "--max-num-batched-tokens"),
        (["--max-num-waiting", "1000000000000"], "--max-num-waiting"),
        (["--kv-cache-memory", "4", "--max-model-len", "512"], "the KV cache holds"),
    ],
)
def test_options_that_cannot_work_are_one_line(options, words):
    result = run("serve", "--model", DEFAULT_MODEL, "--port", "0", *options)
    assert 0 < result.returncode < 100, result.stderr
    assert words in result.stderr and "panicked" not in result.stderr


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        (["--enforce-eager"], {}, "--enforce-eager is for graphs of the CUDA provider"),
        (["--gpu-memory-utilization", "0.5"], {}, "--gpu-memory-utilization is for graphs of the CUDA"),
        ([], {"GLMSERVE_SIMD": "sse2"}, 'GLMSERVE_SIMD is "sse2", which is none of portable'),
    ],
)
def test_what_is_wrong_without_the_model_is_told_before_the_port_is_bound(options, environment, words):
    result = run("serve", "--model", DEFAULT_MODEL, "--port", "0", *options, **environment)
    assert result.returncode == 1 and words in result.stderr, result.stderr
    assert "listening" not in result.stderr


def test_nothing_is_sent_or_noted_about_the_user(tiny_model, tmp_path):
    """ONNX Runtime would keep a device id and a queue of events under the home folder."""
    out = tmp_path / "logits.npy"
    home = tmp_path / "home"
    home.mkdir()
    result = run(
        "logits", "--model", tiny_model, "--ids", "1,2,3", "--out", out, HOME=str(home), XDG_CACHE_HOME=""
    )
    assert result.returncode == 0, result.stderr
    assert out.exists() and list(home.rglob("*")) == []


def test_a_missing_folder_is_named():
    result = run("serve", "--model", "no/such/folder")
    assert result.returncode != 0 and "no/such/folder" in result.stderr


@pytest.fixture
def server(start_server):
    """Two streams at a time of a model that is slow enough for tests to act meanwhile."""
    return start_server(
        DEFAULT_MODEL,
        *("--max-num-seqs", "2", "--max-num-waiting", "30", "--drain-timeout", "4"),
        # What waits here would wait for minutes, and is not to be refused for it.
        *("--queue-timeout", "3600"),
    )


def open_stream(server, body) -> socket.socket:
    """Sends a streaming request over a bare socket, so that it can vanish at will."""
    payload = json.dumps({"model": MODEL, "stream": True} | body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
    ]
    connection.sendall("\r\n".join([*head, "", ""]).encode() + payload)
    return connection


def test_queued_clients_that_vanish_leave_nothing_behind(server):
    """2 run, 24 wait; all vanish; the queue and the cache are empty again long before they would end."""
    connections = [open_stream(server, LONG) for _ in range(26)]
    server.wait_metric("glmserve_requests_waiting", 24)
    for connection in connections[2:]:
        connection.close()
    server.wait_metric("glmserve_requests_waiting", 0, timeout_s=5)
    for connection in connections[:2]:
        connection.close()
    server.wait_metric("glmserve_requests_running", 0, timeout_s=5)
    metrics = server.metrics()
    assert metrics["glmserve_kv_cache_usage_ratio"] == 0
    assert metrics['glmserve_streams_total{outcome="abort"}'] == 26


def test_overload_is_an_answer(server):
    connections = [open_stream(server, LONG) for _ in range(32)]
    server.wait_metric("glmserve_requests_waiting", 30)
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model=MODEL, messages=LONG["messages"])
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    assert server.status("/readyz") == 200
    for connection in connections:
        connection.close()


def test_sigterm_lets_streams_end_and_says_why(server):
    """A running stream that outlasts the drain time gets a typed error event and [DONE]."""
    connection = open_stream(server, LONG)
    short = open_stream(server, LONG | {"max_tokens": 30})
    server.wait_metric("glmserve_requests_running", 2)
    server.process.send_signal(signal.SIGTERM)
    received = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:

        def read(name, stream):
            data = b""
            while b"[DONE]" not in data and (part := stream.recv(65536)):
                data += part
            received[name] = data.decode(errors="replace")

        list(pool.map(lambda pair: read(*pair), [("long", connection), ("short", short)]))
    assert '"finish_reason":"length"' in received["short"]
    assert '"error"' in received["long"] and "shutting down" in received["long"]
    assert received["long"].index('"error"') < received["long"].index("data: [DONE]")
    assert server.process.wait(timeout=20) == 0


def test_metrics_are_what_prometheus_expects(server):
    promtool = ROOT / ".tools" / "bin" / "promtool"
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    client.chat.completions.create(model=MODEL, messages=LONG["messages"], max_tokens=4)
    text = subprocess.run(["curl", "-sf", server.url + "/metrics"], capture_output=True, check=True).stdout
    result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert result.returncode == 0, result.stderr.decode() + result.stdout.decode()
    metrics = server.metrics()
    assert metrics["glmserve_generation_tokens_total"] >= 4
    assert metrics["glmserve_time_to_first_token_seconds_count"] >= 1
    assert metrics["glmserve_empty_streams_total"] == 0


def test_an_api_key_guards_v1_only(start_server, tiny_model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# team a\nsecret-a\n\nsecret-b\n")
    server = start_server(tiny_model, "--api-key-file", keys)
    for key, status in [("secret-a", 200), ("secret-b", 200), ("wrong", 401), ("# team a", 401)]:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)
        if status == 200:
            assert list(client.models.list())
        else:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
    assert server.status("/readyz") == 200 and server.status("/v1/models") == 401
