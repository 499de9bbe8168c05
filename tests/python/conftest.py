"""Owns the server processes that the end-to-end tests talk to.

Everything here is what a user has: the release binary, a folder made by the exporter, a port.
"""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import onnxruntime
import pytest

ROOT = Path(__file__).resolve().parents[2]
# What tests share with the benches.
sys.path.insert(0, str(ROOT / "tests" / "bench"))
GLMSERVE = ROOT / "target" / "release" / "glmserve"
DEFAULT_MODEL = ROOT / ".models" / "smollm2-135m-instruct"
# The library that the server loads comes out of the Python package's wheel.
LIBRARY = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
os.environ.setdefault("GLMSERVE_ORT_LIB", str(LIBRARY))


class Server:
    """A running `glmserve serve`; its log is kept for the failure message."""

    def __init__(self, model: Path, log: Path, *options: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [GLMSERVE, "serve", "--model", model, "--port", str(self.port), *options]
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=log.open("w"), stderr=subprocess.STDOUT
        )

    def wait_ready(self, timeout_s: float = 60) -> "Server":
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            if self.status("/readyz") == 200:
                return self
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log.read_text()}")

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics by name and labels."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=5) as answer:
            text = answer.read().decode()
        pairs = re.findall(r"^([a-z_]+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in pairs}

    def wait_metric(self, name: str, value: float, timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while (found := self.metrics()[name]) != value:
            assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
            time.sleep(0.02)

    def stop(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="session")
def start_server(tmp_path_factory):
    """Starts servers and stops what is left of them at the end."""
    servers = []

    def start(model: Path, *options: str) -> Server:
        log = tmp_path_factory.mktemp("server") / "log"
        server = Server(model, log, *options)
        servers.append(server)
        return server.wait_ready()

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A tiny random ChatGLM3 checkpoint, exported: real code, meaningless text, fast."""
    folder = tmp_path_factory.mktemp("tiny")
    run = [sys.executable, "-m"]
    subprocess.run([*run, "glm_export.dev.tiny", folder / "checkpoint"], check=True)
    export = [
        Path(sys.executable).with_name("glm-export"),
        folder / "checkpoint",
        folder / "model",
        "--precision",
        "fp32",
    ]
    subprocess.run(export, check=True)
    return folder / "model"


@pytest.fixture(scope="session")
def default_server(start_server) -> Server:
    """The default model under its own name and an alias."""
    assert DEFAULT_MODEL.exists(), "the default model is missing: run `make model`"
    return start_server(DEFAULT_MODEL, "--served-model-name", "chatglm3-6b")


def pytest_report_header() -> str:
    return f"server: {os.path.relpath(GLMSERVE, ROOT)}"
