"""Is a request answered beside clients that only hold what they can? What memory do they cost?

    .venv/bin/python tests/bench/lockup.py [--counts 32,256,1024] [--program target/release/glmserve]

The first table has a row for each kind of hostile client, so many at once from 127.0.0.1: how many small
requests (a line), how many large ones (1 MiB) of 127.0.0.2 have status 200 beside them and after how long the
last one, what the others got, and the highest resident memory of the server until then. The second table is
the highest resident memory of a fresh server after bodies that are as large as allowed. The exit status says
whether every small request was served.
"""

import argparse
import http.client
import json
import re
import resource
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from serving import serve_process

LARGEST = 8 << 20
NUM_SMALL, NUM_LARGE = 8, 2
ANSWER_LIMIT_S = 15
# What all clients of one row may send at once.
ROW_BYTES = 512 << 20
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + "Transfer-Encoding: chunked\r\n\r\n"
LENGTH = HEAD + f"Content-Length: {LARGEST}\r\n"
HALF = b'{"stop":[' + b"0," * (LARGEST // 4)
# Name, what is sent at once, and what is sent again every tenth of a second.
KINDS = [
    ("idle connection", b"", b""),
    ("half a head", b"POST /v1/chat", b""),
    ("chunked, no body", CHUNKED.encode(), b""),
    ("length, no body", f"{LENGTH}\r\n".encode(), b""),
    ("expect, no body", f"{LENGTH}Expect: 100-continue\r\n\r\n".encode(), b""),
    ("slow body", f"{LENGTH}\r\n".encode(), b" "),
    ("slow chunks", CHUNKED.encode(), b"1\r\n \r\n"),
    ("half a body", f"{LENGTH}\r\n".encode() + HALF, b""),
]
# Name, and the elements of a list of stops that fills a body.
BODIES = [("half a million stops", b'"0123456789abc",'), ("four million zeros", b"0,")]


@contextmanager
def hostile(url: str, number: int, start: bytes, again: bytes) -> Iterator[None]:
    """So many clients that send `start` at once and `again` now and then, until the block is left."""
    address = urllib.parse.urlsplit(url)
    over, sockets = threading.Event(), []

    def connect(_: int) -> None:
        # The server may refuse or cut it: that is its right.
        with suppress(OSError):
            client = socket.create_connection((address.hostname, address.port), timeout=10)
            sockets.append(client)
            client.sendall(start)

    def keep_on() -> None:
        while again and not over.wait(0.1):
            for client in sockets:
                with suppress(OSError):
                    client.send(again)

    # Not all at once: the test is of what they hold, not of the listen queue.
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(connect, range(number)))
    slow = threading.Thread(target=keep_on)
    slow.start()
    try:
        yield
    finally:
        over.set()
        slow.join()
        for client in sockets:
            client.close()


def post(url: str, body: bytes, headers: dict[str, str]) -> str:
    """The status of this request from 127.0.0.2, or why there is none."""
    address = urllib.parse.urlsplit(url)
    client = http.client.HTTPConnection(
        address.hostname, address.port, timeout=ANSWER_LIMIT_S, source_address=("127.0.0.2", 0)
    )
    try:
        # The answer may come before the whole body has been taken.
        with suppress(ConnectionError):
            client.request(
                "POST", "/v1/chat/completions", body, {"Content-Type": "application/json", **headers}
            )
        return str(client.getresponse().status)
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        client.close()


def ask(url: str, model: str, number: int, num_bytes: int) -> tuple[bool, str]:
    """Whether all of so many requests with bodies of this size are served one by one, and words for it."""
    request = {"model": model, "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 4}
    body = json.dumps(request).encode() + b" " * num_bytes
    statuses, begin, longest = Counter(), time.perf_counter(), 0.0
    while statuses.total() < number and time.perf_counter() - begin < ANSWER_LIMIT_S:
        sent = time.perf_counter()
        statuses[post(url, body, {})] += 1
        longest = max(longest, time.perf_counter() - sent)
    others = "".join(f" {n}x{status}" for status, n in statuses.items() if status != "200")
    return statuses["200"] == number, f"{statuses['200']}/{number} {longest:.1f} s{others}"


def peak_mib(pid: int) -> float:
    """The process's highest resident memory so far."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def lock_up(url: str, pid: int, counts: list[int]) -> bool:
    """The first table; whether every small request was served."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    print(f"{'clients':>7}  {'kind':<17}  {'small':<24}  {'large':<24}  {'MiB':>6}", flush=True)
    all_served = True
    for number in counts:
        for name, start, again in KINDS:
            if number * len(start) > ROW_BYTES:
                continue
            with hostile(url, number, start, again):
                served, small = ask(url, model, NUM_SMALL, 0)
                _, large = ask(url, model, NUM_LARGE, 1 << 20)
            all_served &= served
            print(f"{number:7}  {name:<17}  {small:<24}  {large:<24}  {peak_mib(pid):6.0f}", flush=True)
            time.sleep(1)
    return all_served


def memory(program: str, arguments: list[str]) -> None:
    """The second table."""
    print(
        f"\n{'bodies':>6}  {'of 8 MiB':<21}  {'key':<3}  {'before':>6}  {'peak MiB':>8}  statuses", flush=True
    )
    for name, element in BODIES:
        begin, end = b'{"messages":[{"role":"user","content":"hi"}],"stop":[', element[:-1] + b"]}"
        body = begin + element * ((LARGEST - len(begin) - len(end)) // len(element)) + end
        for number, has_key in [(1, False), (1, True), (8, True)]:
            with serve_process(program, arguments) as (url, pid), ThreadPoolExecutor(number) as pool:
                before = peak_mib(pid)
                headers = [{"Idempotency-Key": f"key-{i}"} if has_key else {} for i in range(number)]
                statuses = Counter(pool.map(post, [url] * number, [body] * number, headers))
                words = " ".join(f"{n}x{status}" for status, n in statuses.items())
                key = "yes" if has_key else "no"
                print(
                    f"{number:6}  {name:<21}  {key:<3}  {before:6.0f}  {peak_mib(pid):8.0f}  {words}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".models/smollm2-135m-instruct")
    parser.add_argument("--counts", default="32,256,1024")
    parser.add_argument("--program", default="target/release/glmserve")
    options = parser.parse_args()
    counts = [int(number) for number in options.counts.split(",")]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * max(counts))), hard))
    arguments = ["--model", options.model]
    with serve_process(options.program, arguments) as (url, pid):
        all_served = lock_up(url, pid, counts)
    memory(options.program, arguments)
    sys.exit(not all_served)


if __name__ == "__main__":
    main()
