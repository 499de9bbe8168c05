"""The clients that people start with: `glmserve chat` and the Python example, over connections that break."""

import importlib.util
import itertools
import signal
import socket
import subprocess
import threading

import httpx
import openai
import pytest
from conftest import GLMSERVE, ROOT
from examples import CAPITAL

MODEL = "smollm2-135m-instruct"
QUESTION = CAPITAL.question


def load_example():
    path = ROOT / "server" / "client" / "examples" / "chat.py"
    spec = importlib.util.spec_from_file_location("chat_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CuttingProxy:
    """Lets a growing number of bytes of each answer through, then closes the connection."""

    def __init__(self, port: int):
        self.upstream = ("127.0.0.1", port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.num_connections = 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        for number in itertools.count():
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.num_connections += 1
            threading.Thread(target=self.serve, args=(client, 700 + 150 * number), daemon=True).start()

    def serve(self, client: socket.socket, allowed: int) -> None:
        with client, socket.create_connection(self.upstream) as server:
            up = threading.Thread(target=self.copy, args=(client, server, 1 << 30), daemon=True)
            up.start()
            self.copy(server, client, allowed)
            for side in (client, server):
                side.shutdown(socket.SHUT_RDWR)
            up.join()

    @staticmethod
    def copy(source: socket.socket, target: socket.socket, allowed: int) -> None:
        try:
            while allowed > 0 and (data := source.recv(65536)):
                target.sendall(data[:allowed])
                allowed -= len(data)
        except OSError:
            pass


@pytest.fixture
def proxy(default_server):
    proxy = CuttingProxy(default_server.port)
    yield proxy
    proxy.listener.close()


@pytest.fixture(scope="module")
def expected(default_server):
    client = openai.OpenAI(base_url=default_server.url + "/v1", api_key="none")
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0
    )
    return answer.choices[0].message.content


def chat(*options, **kwargs):
    command = [GLMSERVE, "chat", "--temperature", "0", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


def test_the_python_example_resumes(proxy, expected):
    body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    with httpx.Client(base_url=proxy.url) as client:
        assert "".join(load_example().stream_chat(client, body)) == expected
    assert proxy.num_connections > 2


def test_the_python_example_names_errors(default_server):
    with httpx.Client(base_url=default_server.url) as client, pytest.raises(RuntimeError, match="gpt-4"):
        list(load_example().stream_chat(client, {"model": "gpt-4", "messages": []}))


def test_one_message_resumes(proxy, expected):
    result = chat("--base-url", proxy.url, "--model", MODEL, "--message", QUESTION)
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected + "\n"
    assert proxy.num_connections > 2


def test_a_chat_from_standard_input_keeps_its_history(default_server, expected):
    lines = [QUESTION, "What was my last question?", "/reset", QUESTION, "/quit", "never said"]
    result = chat("--base-url", default_server.url, input="\n".join(lines))
    assert result.returncode == 0 and not result.stderr, result.stderr
    first, *rest = result.stdout.split(expected + "\n")
    assert first == "" and rest[-1] == "" and len(rest) == 2, "the reset chat answers as the first time"


def test_a_chat_that_cannot_be_says_why(default_server):
    result = chat("--base-url", "http://127.0.0.1:1", "--message", QUESTION)
    assert result.returncode == 1 and "refused" in result.stderr
    result = chat("--base-url", default_server.url, "--model", "gpt-4", "--message", QUESTION)
    assert result.returncode == 1 and "gpt-4" in result.stderr


def read_request(connection: socket.socket) -> tuple[str, dict[str, str]]:
    """The first line and the headers of a request, after all of it has come."""
    data = b""
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        if end and len(body) >= int(headers.get("content-length", 0)):
            return lines[0], headers
        received = connection.recv(65536)
        assert received, data
        data += received


def test_ctrl_c_before_the_answer_ends_the_request_at_the_server():
    """To close the connection is not enough: a request with a key goes on for a client that comes back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = [
            GLMSERVE,
            "chat",
            "--base-url",
            url,
            "--model",
            "m",
            "--message",
            QUESTION,
            "--api-key",
            "secret",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            question, _ = listener.accept()
            with question:
                line, headers = read_request(question)
                assert line == "POST /v1/chat/completions HTTP/1.1"
                process.send_signal(signal.SIGINT)
                stop, _ = listener.accept()
            with stop:
                line, stop_headers = read_request(stop)
                stop.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            _, stderr = process.communicate(timeout=60)
    assert line == "DELETE /v1/streams HTTP/1.1"
    assert stop_headers["idempotency-key"] == headers["idempotency-key"]
    assert stop_headers["authorization"] == "bearer secret"
    assert process.returncode == 1 and "not whole: stopped" in stderr, stderr
