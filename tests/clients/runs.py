"""Owns one run: a server of its own, the client's program, and the comparison with what was said.

Each run has a server of its own, as a silence of the double's stops every reply of that server.
"""

import concurrent.futures
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from .catalogue import Client
from .environments import Installed

SERVER = Path(__file__).resolve().parents[2] / "target" / "release" / "examples" / "scripted_server"
# Line separators of Unicode, a character with the byte 0x85 in it, an emoji of four bytes.
TEXT = "Hello, 入门！你好，世界 🌍. One\u2028two\u2029three\u0085four; data: not an event. The end."
MODEL = "test-model"
TIME_LIMIT_S = 180


@dataclass(frozen=True)
class Result:
    """What became of one ability of one client."""

    client: str
    ability: str
    ok: bool
    seconds: float
    detail: str = ""

    def as_json(self) -> dict:
        """Itself as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Pace:
    """How long the server says nothing, and how often it sends a heartbeat meanwhile."""

    silence_s: float = 12.0
    heartbeat_s: float = 10.0


def run_all(
    clients: list[Client], installed: dict[str, Installed], work: Path, pace: Pace, at_once: int
) -> list[Result]:
    """Every ability of every client that can run here, in the order of the catalogue."""
    jobs = [
        (client, ability)
        for client in clients
        if not installed[client.name].missing
        for ability in client.abilities
    ]
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda job: run(*job, installed[job[0].name], work, pace), jobs))


def run(client: Client, ability: str, installed: Installed, work: Path, pace: Pace) -> Result:
    """One ability of one client; the server's log stays in `work`."""
    log = work / f"{client.name}-{ability}.log"
    with log.open("w") as sink, _server(sink, pace.heartbeat_s) as url:
        case = _case(ability, pace.silence_s)
        expected = case | {"completion_tokens": _completion_tokens(url)} if ability == "usage" else case
        start = time.monotonic()
        try:
            done = subprocess.run(
                [*installed.command, ability, url + "/v1"],
                input=json.dumps(case),
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Result(client.name, ability, False, TIME_LIMIT_S, f"no end within {TIME_LIMIT_S} s")
        seconds = time.monotonic() - start
    wrong = _wrong(done, expected, seconds, 2 * pace.silence_s if ability.startswith("silence") else 0)
    return Result(client.name, ability, not wrong, round(seconds, 2), wrong)


def _case(ability: str, silence_s: float) -> dict:
    if ability.startswith("silence"):
        return {"say": f"hush {round(silence_s * 1000)} {TEXT}", "text": TEXT, "model": MODEL}
    if ability == "retry":
        return {"say": f"hush 700 {TEXT}", "text": TEXT, "model": MODEL}
    return {"say": f"say {TEXT}", "text": TEXT, "model": MODEL}


def _wrong(done: subprocess.CompletedProcess, expected: dict, seconds: float, least_s: float) -> str:
    """What is wrong with a program's answer; empty if it is right."""
    if done.returncode != 0:
        return f"exit code {done.returncode}\n{done.stderr[-3000:]}"
    # Not splitlines(), which splits at the separators that the text has inside.
    try:
        answer = json.loads(done.stdout.rstrip("\n").split("\n")[-1])
    except json.JSONDecodeError as error:
        return f"the program printed no JSON: {error}\n{done.stdout[-1000:]}\n{done.stderr[-1000:]}"
    for name, value in answer.items():
        if value != expected.get(name, True):
            return f"{name} is {value!r}, not {expected.get(name, True)!r}\n{done.stderr[-1000:]}"
    if not answer:
        return "the program compared nothing"
    # A silence that did not happen would prove nothing.
    return f"took {seconds:.1f} s, so there was no silence" if seconds < least_s else ""


def _completion_tokens(url: str) -> int:
    body = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": f"say {TEXT}"}]}
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["usage"]["completion_tokens"]


@contextmanager
def _server(log, heartbeat_s: float) -> Iterator[str]:
    command = [SERVER, str(round(heartbeat_s * 1000))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        url = process.stdout.readline().strip()
        assert url, f"{SERVER} did not start"
        yield url
    finally:
        process.kill()
        process.wait()
