"""Owns what a long export says while it runs: a bar on a terminal, a line now and then elsewhere.

Invariant: what takes less than a few seconds says nothing, so short runs and their logs stay clean.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

# Seconds before a bar appears, and between two lines where there is no terminal.
DELAY_S = 2.0
INTERVAL_S = 10.0

# Called with what is being worked on, and how many bytes of it were done.
Advance = Callable[[str, int], None]


@contextmanager
def phase(title: str, num_bytes: int, stream: TextIO | None = None) -> Iterator[Advance]:
    """One stage of the work, `num_bytes` in all."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield _Lines(title, num_bytes, stream).advance
        return
    with tqdm(
        desc=title, total=num_bytes, unit="B", unit_scale=True, file=stream, delay=DELAY_S, leave=False
    ) as bar:

        def advance(name: str, done: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(done)

        yield advance


class _Lines:
    """Progress for a log file."""

    def __init__(
        self, title: str, num_bytes: int, stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title = title
        self._total = num_bytes
        self._stream = stream
        self._clock = clock
        self._started = self._said = clock()
        self._done = 0

    def advance(self, name: str, done: int) -> None:
        self._done += done
        now = self._clock()
        if now - self._said < INTERVAL_S or not self._done:
            return
        self._said = now
        left = (now - self._started) / self._done * (self._total - self._done)
        gigabytes = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        print(f"{self._title}: {gigabytes}, {left:.0f} s left, {name}", file=self._stream, flush=True)
