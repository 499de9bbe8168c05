"""What `glmserve serve` makes of a device that fails: the GPU wheel over the double of the CUDA libraries.

Runs where CUDA_STUB and GLMSERVE_TEST_CUDA are set (`make test-cuda`). Numbers mean nothing there, so the
folder is served without its known answer, except where that is what fails.
"""

import contextlib
import json
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import Server
from gpu_check import forget_known_answer

pytestmark = pytest.mark.skipif(
    not {"CUDA_STUB", "GLMSERVE_TEST_CUDA"} <= os.environ.keys(),
    reason="needs the GPU wheel, the CUDA double and its folders: make test-cuda",
)

ENGINE_FAILED = 70
# Errors after which every call fails, each with the double's words for it.
STICKY = {
    700: "an illegal memory access was encountered",
    719: "unspecified launch failure",
    214: "uncorrectable ECC error encountered",
    46: "busy or unavailable",
    999: "unknown error",
}
# Without candidates: recycled memory of the double is not zero, and would name tokens that don't exist.
GRAPH = "fp16-logits"
OPTIONS = ["--kv-cache-memory", "64", "--max-num-seqs", "2", "--speculative-tokens", "0", "--threads", "1"]
MESSAGES = [{"role": "user", "content": "go"}]
REQUEST = {"model": "tiny-random", "messages": MESSAGES, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that starts over the double."""
    folder = tmp_path_factory.mktemp("cuda") / "model"
    shutil.copytree(Path(os.environ["GLMSERVE_TEST_CUDA"]) / GRAPH, folder)
    forget_known_answer(folder)
    return folder


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts servers whose device fails as `fault` says while the file `now` exists."""
    with contextlib.ExitStack() as stack:

        def start(folder, fault, now, *options):
            monkeypatch.setenv("GLMSERVE_STUB_FAIL", str(fault))
            monkeypatch.setenv("GLMSERVE_STUB_WHEN", str(now))
            # So that streams still run when the device fails.
            monkeypatch.setenv("GLMSERVE_STUB_GRAPH_MS", "20")
            server = Server(folder, tmp_path / "log", *OPTIONS, *options)
            stack.callback(server.process.wait, 30)
            stack.callback(server.process.kill)
            return server

        yield start


def post(server, **more):
    body = json.dumps(REQUEST | more).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(server.url + "/v1/chat/completions", body, headers)
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        error.msg = error.read().decode()
        raise


def two_streams(server):
    """Streams that both run."""
    streams = [post(server, stream=True, max_tokens=900) for _ in range(2)]
    server.wait_metric("glmserve_requests_running", 2)
    return streams


def error_of(stream):
    """The code of the one error that a stream ends with."""
    events = [line[6:] for line in stream.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", events
    errors = [event["error"] for event in map(json.loads, events[:-1]) if "error" in event]
    assert [error["type"] for error in errors] == ["server_error"], events
    assert "error" in json.loads(events[-2]), events
    return errors[0]["code"]


@pytest.mark.parametrize("code", STICKY)
def test_a_sticky_error_ends_streams_with_an_error_and_the_process_with_its_own_code(
    folder, start, tmp_path, code
):
    now = tmp_path / "now"
    server = start(folder, code, now).wait_ready()
    streams = two_streams(server)
    now.touch()
    assert [error_of(stream) for stream in streams] == ["device_lost", "device_lost"]
    assert server.process.wait(60) == ENGINE_FAILED
    log = server.log.read_text()
    assert f"CUDA failure {code}: " in log and STICKY[code] in log, log
    assert "the device failed, and this process can't use it again" in log, log
    assert "only a new process can serve again, so this one ends" in log, log


def test_an_error_that_heals_does_not_end_the_process(folder, start, tmp_path):
    now = tmp_path / "now"
    server = start(folder, 701, now).wait_ready()
    streams = two_streams(server)
    now.touch()
    assert [error_of(stream) for stream in streams] == ["model_failed", "model_failed"]
    assert "CUDA failure 701: too many resources requested for launch" in server.log.read_text()
    # Often enough that the server asks for its known answer.
    for _ in range(5):
        with pytest.raises(urllib.error.HTTPError, match="model_failed"):
            post(server, max_tokens=4)
    assert server.status("/readyz") == 503
    now.unlink()
    server.wait_ready()
    with post(server, max_tokens=4) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 4
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("code", "options", "has_known_answer", "words"),
    [
        (700, [], True, "the model fails on the prompt of its known answer"),
        (999, [], False, "the device failed while it was prepared"),
        (46, ["--enforce-eager"], False, "warm-up: the device that computes has failed"),
    ],
    ids=["the known answer", "the capture of graphs", "the warm-up"],
)
def test_a_device_that_fails_at_the_start_ends_the_process_with_the_same_code(
    folder, start, tmp_path, code, options, has_known_answer, words
):
    """A session launches nothing while it is opened, so that the first launch is what comes next."""
    if has_known_answer:
        folder = Path(os.environ["GLMSERVE_TEST_CUDA"]) / GRAPH
    now = tmp_path / "now"
    now.touch()
    server = start(folder, code, now, *options)
    assert server.process.wait(60) == ENGINE_FAILED, server.log.read_text()
    log = server.log.read_text()
    assert words in log and STICKY[code] in log, log
