"""Hundreds of requests at once, then minutes at twice the capacity: who is refused, and who waits in vain?

    .venv/bin/python tests/bench/burst.py [--requests 400] [--queue-timeout 60] [--minutes 10]

A burst on a server that has only just started and on one that knows its work, each beside a closed loop of
as many streams as the server runs at a time, and beside the same burst where nobody is refused: its times to
first token say which of the refused would have been served within the limit. The exit status says whether no
accepted request ended in `queue_timeout`.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from conftest import DEFAULT_MODEL, Server

PATH = "/v1/chat/completions"
WORDS = ("sea", "wind", "stone", "light", "harbour")
# Requests have other numbers in each phase: a prompt that was asked before is in the prefix cache, and its
# answer would be compared with one that had to compute it.
BURST, WARM_UP, LOOP, SUSTAINED = 0, 1_000_000, 2_000_000, 3_000_000


@dataclasses.dataclass
class Answer:
    """How a request was answered: `code` is `ok` or that of its error."""

    code: str
    first_token_s: float = 0.0
    num_tokens: int = 0
    retry_after_s: float = 0.0


def body(number: int, max_tokens: int) -> dict:
    return {
        "model": DEFAULT_MODEL.name,
        "messages": [{"role": "user", "content": f"{number:07}: {WORDS[number % len(WORDS)]}"}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(client: httpx.AsyncClient, number: int, max_tokens: int) -> Answer:
    begin, first = time.perf_counter(), 0.0
    async with client.stream("POST", PATH, json=body(number, max_tokens)) as response:
        if response.status_code != 200:
            error = json.loads(await response.aread())["error"]
            return Answer(error["code"], retry_after_s=float(response.headers.get("retry-after", 0)))
        answer = Answer("cut short")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return Answer(event["error"]["code"])
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - begin
            if event.get("usage"):
                answer = Answer("ok", first, event["usage"]["completion_tokens"])
        return answer


async def at_once(url: str, count: int, max_tokens: int) -> tuple[list[Answer], float]:
    """Sends all at once; returns the answers and tokens a second."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as client:
        begin = time.perf_counter()
        answers = await asyncio.gather(*(ask(client, BURST + index, max_tokens) for index in range(count)))
        seconds = time.perf_counter() - begin
    return answers, sum(answer.num_tokens for answer in answers) / seconds


async def closed_loop(url: str, first: int, streams: int, requests: int, max_tokens: int) -> float:
    """Tokens a second of so many streams, each of which asks again as soon as it is answered."""
    async with httpx.AsyncClient(base_url=url, timeout=3600) as client:
        numbers, num_tokens = iter(range(first, first + requests)), 0

        async def stream() -> None:
            nonlocal num_tokens
            for number in numbers:
                answer = await ask(client, number, max_tokens)
                # Not in one statement: the sum would be read before the wait, and others' tokens lost.
                num_tokens += answer.num_tokens

        begin = time.perf_counter()
        await asyncio.gather(*(stream() for _ in range(streams)))
        return num_tokens / (time.perf_counter() - begin)


async def sustained(url: str, rate: float, minutes: float, max_tokens: int) -> list[Answer]:
    """Requests at a fixed rate, whatever becomes of the others."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as client:
        begin, tasks = time.perf_counter(), []
        for number in range(int(rate * minutes * 60)):
            await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client, SUSTAINED + number, max_tokens)))
        return await asyncio.gather(*tasks)


@contextlib.contextmanager
def server(args: argparse.Namespace, queue_timeout_s: int) -> Iterator[str]:
    options = ["--max-num-seqs", str(args.streams), "--max-num-waiting", str(args.max_num_waiting)]
    options += ["--queue-timeout", str(queue_timeout_s), "--first-token-timeout", "0"]
    with tempfile.TemporaryDirectory() as folder:
        running = Server(DEFAULT_MODEL, Path(folder) / "log", *options).wait_ready()
        try:
            yield running.url
        finally:
            running.stop()


def report(name: str, answers: list[Answer]) -> int:
    """Prints what became of them; returns how many waited in vain."""
    counts = collections.Counter(answer.code for answer in answers)
    print(f"{name}: " + ", ".join(f"{count} {code}" for code, count in counts.most_common()))
    retries = sorted(answer.retry_after_s for answer in answers if answer.retry_after_s)
    if retries:
        busiest = max(collections.Counter(retries).values())
        print(f"  Retry-After from {retries[0]:.0f} to {retries[-1]:.0f} s, at most {busiest} in one second")
    return counts["queue_timeout"]


def burst(args: argparse.Namespace, is_warm: bool) -> int:
    name = "warm" if is_warm else "cold"
    answers, free = [], []
    for limit_s, found in ((args.queue_timeout, answers), (0, free)):
        with server(args, limit_s) as url:
            if is_warm:
                asyncio.run(closed_loop(url, WARM_UP, args.streams, 4 * args.streams, args.max_tokens))
            replies, rate = asyncio.run(at_once(url, args.requests, args.max_tokens))
            found += replies
            if limit_s:
                num_served = sum(answer.code == "ok" for answer in replies)
                loop = asyncio.run(closed_loop(url, LOOP, args.streams, num_served, args.max_tokens))
                part = f"{100 * rate / loop:.0f} %"
                print(f"{name}: {rate:.1f} tok/s at once, {loop:.1f} in a closed loop: {part}")
    in_vain = report(name, answers)
    refused = [index for index, answer in enumerate(answers) if answer.code == "queue_timeout_unmeetable"]
    in_time = sum(free[index].first_token_s <= args.queue_timeout for index in refused)
    print(f"  of {len(refused)} refused for time, {in_time} would have been served in time")
    return in_vain


def overload(args: argparse.Namespace) -> int:
    with server(args, args.queue_timeout) as url:
        loop = closed_loop(url, WARM_UP, args.streams, 8 * args.streams, args.max_tokens)
        rate = asyncio.run(loop) / args.max_tokens
        print(f"capacity: {rate:.1f} requests a second; twice that for {args.minutes:g} minutes")
        return report("sustained", asyncio.run(sustained(url, 2 * rate, args.minutes, args.max_tokens)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--streams", type=int, default=64, help="that run at a time")
    parser.add_argument("--max-num-waiting", type=int, default=256)
    parser.add_argument("--queue-timeout", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=0, help="at twice the capacity")
    args = parser.parse_args()
    in_vain = burst(args, is_warm=False) + burst(args, is_warm=True)
    if args.minutes:
        in_vain += overload(args)
    print(f"{in_vain} accepted requests waited in vain")
    return 1 if in_vain else 0


if __name__ == "__main__":
    sys.exit(main())
