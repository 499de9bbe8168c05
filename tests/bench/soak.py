"""Minutes at twice the capacity, with clients that vanish and abort: does anything leak or go unanswered?

    .venv/bin/python tests/bench/soak.py --minutes 10

Prints the server's memory and queue over time, and at the end how every request was answered. The exit status
says whether all of it held: each request answered, no block held once all are gone, memory flat.
"""

import argparse
import asyncio
import collections
import random
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from conftest import DEFAULT_MODEL, Server

MODEL = "smollm2-135m-instruct"
NUM_SEQS, NUM_WAITING = 8, 16
# Small, so that the first quarter touches every page of the cache and fills what is kept of ended streams.
OPTIONS = {
    "--max-num-seqs": NUM_SEQS,
    "--max-num-waiting": NUM_WAITING,
    "--max-model-len": 512,
    "--kv-cache-memory": 128,
    "--resume-memory": 1,
}
# Twice what the server takes at a time, running and waiting.
NUM_CLIENTS = 2 * (NUM_SEQS + NUM_WAITING)
# After the first quarter memory may grow by this much and no more.
MAX_GROWTH = 1.05
HOW = (("read to the end", 60), ("vanish", 25), ("DELETE", 10), ("no stream", 5))


async def ask(client: httpx.AsyncClient, rng: random.Random) -> str:
    """One request; returns in words how it was answered."""
    how = rng.choices([name for name, _ in HOW], [weight for _, weight in HOW])[0]
    words = " ".join(rng.choice(("sea", "wind", "stone", "light")) for _ in range(rng.randint(1, 60)))
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": words}],
        "max_tokens": rng.randint(1, 48),
        "ignore_eos": True,
        "stream": how != "no stream",
    }
    headers = {"Idempotency-Key": f"{rng.getrandbits(128):032x}"} if rng.random() < 0.5 else {}
    stop_after = rng.randint(0, 20)
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        if answer.status_code != 200:
            await answer.aread()
            if answer.status_code == 429:
                await asyncio.sleep(min(float(answer.headers["Retry-After"]), 2) * rng.random())
            return f"HTTP {answer.status_code}"
        if how == "no stream":
            await answer.aread()
            return "whole"
        data, num_events = b"", 0
        async for part in answer.aiter_bytes():
            data = data[-64:] + part
            num_events += part.count(b"\n\n")
            if how == "vanish" and num_events > stop_after:
                return "vanished"
            if how == "DELETE" and num_events > stop_after:
                gone = await client.delete(f"/v1/streams/{answer.headers['GLM-Stream-Id']}")
                return f"DELETE: HTTP {gone.status_code}"
        return "whole" if b"data: [DONE]\n\n" in data else "CUT SHORT"


async def keep_asking(client, rng, deadline: float, outcomes: collections.Counter) -> None:
    while time.monotonic() < deadline:
        try:
            outcomes[await ask(client, rng)] += 1
        except httpx.HTTPError as error:
            outcomes[f"NOT ANSWERED: {type(error).__name__}"] += 1


def resident_mib(server: Server) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


async def watch(server: Server, began: float, deadline: float, period_s: float) -> list[float]:
    """A line every period; returns the memory at each."""
    memory = []
    print(f"{'s':>6} {'RSS MiB':>8} {'running':>8} {'waiting':>8} {'cache':>6}")
    while time.monotonic() < deadline:
        await asyncio.sleep(period_s)
        metrics = await asyncio.to_thread(server.metrics)
        memory.append(resident_mib(server))
        running, waiting, cache = (
            metrics[f"glmserve_{name}"]
            for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio")
        )
        at = time.monotonic() - began
        print(f"{at:6.0f} {memory[-1]:8.1f} {running:8.0f} {waiting:8.0f} {cache:6.2f}", flush=True)
    return memory


async def soak(server: Server, minutes: float, seed: int) -> bool:
    began = time.monotonic()
    deadline = began + minutes * 60
    outcomes: collections.Counter = collections.Counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        askers = [
            keep_asking(client, random.Random(f"{seed}-{number}"), deadline, outcomes)
            for number in range(NUM_CLIENTS)
        ]
        period_s = max(minutes * 60 / 40, 1)
        memory, *_ = await asyncio.gather(watch(server, began, deadline, period_s), *askers)
    for name, count in outcomes.most_common():
        print(f"{count:8d} {name}")
    # Streams whose client vanished under a key live on for a while.
    for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio"):
        await asyncio.to_thread(server.wait_metric, f"glmserve_{name}", 0, 120)
    settled, highest = max(memory[: max(len(memory) // 4, 1)]), max(memory)
    print(f"all blocks returned; RSS {settled:.1f} MiB after the first quarter, {highest:.1f} at most")
    answered = not any(name.startswith(("NOT ANSWERED", "CUT SHORT", "HTTP 500")) for name in outcomes)
    ready = server.status("/readyz") == 200
    return answered and ready and highest <= settled * MAX_GROWTH


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = [str(part) for option in OPTIONS.items() for part in option]
        server = Server(DEFAULT_MODEL, Path(folder) / "log", *options).wait_ready()
        try:
            held = asyncio.run(soak(server, args.minutes, args.seed))
        finally:
            server.stop()
    print(f"{'held' if held else 'DID NOT HOLD'}; seed {args.seed}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
