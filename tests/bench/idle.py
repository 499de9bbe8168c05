"""A stream that has nothing to say for minutes, through each reverse proxy with its usual 60 s limit.

    .venv/bin/python tests/bench/idle.py --seconds 180

The stream waits in the queue of a server that takes one at a time. Prints, for each proxy, what arrived with
heartbeats as they are by default and with none; the exit status says whether all survived with them.
"""

import argparse
import concurrent.futures
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from conftest import DEFAULT_MODEL, Server
from proxies import PROXIES, Proxy, Reading, read_stream

BODY = {
    "model": "smollm2-135m-instruct",
    "messages": [{"role": "user", "content": "go"}],
    "max_tokens": 8000,
    "ignore_eos": True,
}
PROXY_TIMEOUT_S = 60
# Each keeps the server busy for a minute or more.
NUM_BEFORE = 6


def occupy(url: str, stack: contextlib.ExitStack) -> None:
    """Streams that run one after the other until the stack is left."""
    client = stack.enter_context(httpx.Client(base_url=url, timeout=600))
    for _ in range(NUM_BEFORE):
        stream = client.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True})
        stack.enter_context(stream).raise_for_status()


def measure(folder: Path, seconds: float, comment_period_s: int) -> dict[str, Reading]:
    """Every proxy at once, and no proxy, before one server."""
    options = ["--max-num-seqs", "1", "--keep-alive-comment", str(comment_period_s)]
    # The wait itself is what is tested.
    options += ["--queue-timeout", "0", "--first-token-timeout", "0"]
    with contextlib.ExitStack() as stack:
        server = Server(DEFAULT_MODEL, folder / "log", *options).wait_ready()
        stack.callback(server.stop)
        urls = {"no proxy": server.url}
        for name in PROXIES:
            proxy = Proxy(name, folder / name, server.port, PROXY_TIMEOUT_S)
            stack.callback(proxy.stop)
            urls[name] = proxy.wait_ready().url
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(urls)))
        with contextlib.ExitStack() as busy:
            occupy(server.url, busy)
            body = BODY | {"max_tokens": 20}
            readings = {name: pool.submit(read_stream, url, body) for name, url in urls.items()}
            time.sleep(seconds)
        return {name: reading.result() for name, reading in readings.items()}


def print_table(title: str, readings: dict[str, Reading]) -> None:
    print(f"\n{title}\n{'':10}{'first byte':>12}{'comments':>10}{'longest silence':>17}{'lasted':>9}  ended")
    for name, reading in readings.items():
        first = f"{reading.reads[0] * 1000:.0f} ms" if reading.reads else "none"
        ended = "[DONE]" if reading.done else reading.error or "without [DONE]"
        print(
            f"{name:10}{first:>12}{len(reading.comments):10}{reading.max_gap:15.1f} s{reading.ended:7.1f} s  "
            f"{ended[:60]}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=180)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "with").mkdir()
        (Path(folder) / "without").mkdir()
        beating = measure(Path(folder) / "with", args.seconds, 10)
        print_table(f"idle for {args.seconds:.0f} s, a heartbeat every 10 s", beating)
        silent = measure(Path(folder) / "without", args.seconds, 3600)
        print_table(f"idle for {args.seconds:.0f} s, no heartbeats", silent)
    return 0 if all(reading.done for reading in beating.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
