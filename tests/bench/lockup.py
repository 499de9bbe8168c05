"""Is a request answered beside clients that only hold what they can? What memory do they cost?

    .venv/bin/python tests/bench/lockup.py [--counts 32,256,1024] [--url http://127.0.0.1:8000]

Each row is a kind of hostile client, so many at once from one address: how a small request (a line) and a
large one (1 MiB) of another address are answered beside them, and the server's memory at its highest. `-` is
no answer within the limit. The exit status says whether every small request had status 200. With --url the
server must be one that nobody else uses; the address 127.0.0.2 has to reach it.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from serving import serve

LARGEST = 8 << 20
ANSWER_LIMIT_S = 30
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + "Transfer-Encoding: chunked\r\n\r\n"
LENGTH = HEAD + f"Content-Length: {LARGEST}\r\n"
HALF = b'{"stop":[' + b"0," * (LARGEST // 4)
WHOLE = (HALF + b"0," * LARGEST)[:LARGEST]
# Name, what is sent at once, and what is sent again every tenth of a second.
KINDS = [
    ("idle connection", b"", b""),
    ("half a head", b"POST /v1/chat", b""),
    ("chunked, no body", CHUNKED.encode(), b""),
    ("length, no body", f"{LENGTH}\r\n".encode(), b""),
    ("expect, no body", f"{LENGTH}Expect: 100-continue\r\n\r\n".encode(), b""),
    ("slow body", f"{LENGTH}\r\n".encode(), b" "),
    ("half a body", f"{LENGTH}\r\n".encode() + HALF, b""),
    ("whole body", f"{LENGTH}\r\n".encode() + WHOLE, b""),
]


class Memory(threading.Thread):
    """The server's resident memory at its highest."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.highest = url, 0
        self.start()

    def run(self) -> None:
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as answer:
                    text = answer.read().decode()
                bytes_ = float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.M)[1])
                self.highest = max(self.highest, bytes_)
            except OSError:
                pass
            time.sleep(0.2)


@contextmanager
def hostile(url: str, number: int, start: bytes, again: bytes) -> Iterator[None]:
    """So many clients that send `start` at once and `again` now and then, until the block is left."""
    address = urllib.parse.urlsplit(url)
    over, ready, sockets = threading.Event(), threading.Semaphore(0), []

    def connect() -> None:
        try:
            client = socket.create_connection((address.hostname, address.port), timeout=10)
            sockets.append(client)
            client.sendall(start)
        except OSError:
            pass  # The server may refuse or cut it: that is its right.
        ready.release()

    def keep_on() -> None:
        while again and not over.wait(0.1):
            for client in sockets:
                with suppress(OSError):
                    client.send(again)

    # Not all at once: the test is of what they hold, not of the listen queue.
    for begin in range(0, number, 64):
        threads = [threading.Thread(target=connect) for _ in range(begin, min(begin + 64, number))]
        for thread in threads:
            thread.start()
        for _ in threads:
            ready.acquire()
    slow = threading.Thread(target=keep_on)
    slow.start()
    try:
        yield
    finally:
        over.set()
        slow.join()
        for client in sockets:
            client.close()


def ask(url: str, model: str, num_bytes: int) -> str:
    """Status and seconds of a request with a body of this size."""
    address = urllib.parse.urlsplit(url)
    body = {"model": model, "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 4}
    begin = time.perf_counter()
    client = http.client.HTTPConnection(
        address.hostname, address.port, timeout=ANSWER_LIMIT_S, source_address=("127.0.0.2", 0)
    )
    try:
        client.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body) + " " * num_bytes,
            {"Content-Type": "application/json"},
        )
        status = str(client.getresponse().status)
    except OSError:
        status = "-"
    finally:
        client.close()
    return f"{status} {time.perf_counter() - begin:5.1f} s"


def run(url: str, counts: list[int]) -> bool:
    """All rows; whether every small request was served."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    print(f"{'clients':>7}  {'kind':<17}  {'small':>11}  {'large':>11}  {'MiB':>6}", flush=True)
    all_served = True
    for number in counts:
        for name, start, again in KINDS:
            memory = Memory(url)
            with hostile(url, number, start, again):
                small, large = ask(url, model, 0), ask(url, model, 1 << 20)
            all_served &= small.startswith("200")
            mib = memory.highest / 2**20
            print(f"{number:7}  {name:<17}  {small:>11}  {large:>11}  {mib:6.0f}", flush=True)
            time.sleep(1)
    return all_served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".models/smollm2-135m-instruct")
    parser.add_argument("--counts", default="32,256,1024")
    parser.add_argument("--url", help="of a server that runs already")
    options = parser.parse_args()
    counts = [int(number) for number in options.counts.split(",")]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * max(counts))), hard))
    if options.url:
        all_served = run(options.url, counts)
    else:
        with serve(["--model", options.model]) as url:
            all_served = run(url, counts)
    sys.exit(not all_served)


if __name__ == "__main__":
    main()
