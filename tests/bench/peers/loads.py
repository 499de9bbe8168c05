"""Owns the loads, and their one generator for all servers: `glmserve bench`.

Invariant: every server gets the same prompts in the same order; a round's seed makes them new to its caches.
"""

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .paths import GLMSERVE

TIMEOUT_S = 3600


@dataclass(frozen=True)
class Load:
    """Closed loop of `streams`, or open loop of `rate` requests a second."""

    name: str
    streams: int | None
    rate: float | None
    prompt_tokens: tuple[int, ...]
    max_tokens: tuple[int, ...]
    # Of each stream, or arrivals in all.
    requests: int

    def arguments(self) -> list[str]:
        """Its form for `glmserve bench`."""
        if self.streams is not None:
            shape = ["--streams", self.streams, "--requests-per-stream", self.requests]
        else:
            shape = ["--rates", self.rate, "--arrivals", self.requests]
        lengths = ["--prompt-tokens", _listed(self.prompt_tokens), "--max-tokens", _listed(self.max_tokens)]
        return [str(part) for part in (*shape, *lengths)]


def choose(streams: list[int], rates: list[float], mixed: int, is_quick: bool) -> list[Load]:
    """The loads of a run. A quick one has fewer requests, and shorter replies."""
    outputs, requests = ((32, 48, 64), 4) if is_quick else ((64, 96, 128), 8)
    loads = [Load(f"{count} streams", count, None, (128,), outputs, requests) for count in streams]
    if mixed:
        name = f"{mixed} streams, prompts 128 and 1024"
        loads.append(Load(name, mixed, None, (128, 1024), outputs, requests))
    arrivals = 16 if is_quick else 64
    loads += [Load(f"{rate:g} requests/s", None, rate, (128,), outputs, arrivals) for rate in rates]
    return loads


def generate(load: Load, url: str, seed: int) -> dict:
    """Puts one load on a server; returns the generator's figures."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [GLMSERVE, "bench", "--base-url", url, "--seed", str(seed), "--json", report]
        command += ["--idle-timeout-s", "1200", *load.arguments()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        # Broken streams give a report and a failure; it counts them.
        if not report.is_file() or not report.stat().st_size:
            raise RuntimeError(f"glmserve bench: {done.stderr.strip()}")
        return json.loads(report.read_text())["runs"][0]


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
