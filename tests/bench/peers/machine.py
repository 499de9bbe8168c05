"""Owns what the machine can do at most, measured beside each round, and which rounds that spoils.

Invariant: a round is judged by its own probes and the median of all; none is dropped for its result.
"""

import json
import subprocess
from pathlib import Path
from statistics import median

from .paths import PROBE

TOLERANCE = 0.15
# The int8 peak through tiles depends on more than the state (clocks under tiles), so it is only reported.
STATE = ("read_gb_per_s", "int8_vnni_gops")


def probe() -> dict:
    """Read bandwidth and arithmetic peaks of this moment."""
    return json.loads(subprocess.run([PROBE], check=True, capture_output=True, timeout=60).stdout)


def medians(probes: list[dict]) -> dict:
    """The median of each figure that was measured."""
    figures = {}
    for key in probes[0] if probes else ():
        values = [probe[key] for probe in probes if probe[key] is not None]
        figures[key] = median(values) if values else None
    return figures


def is_off(probes: list[dict], typical: dict) -> bool:
    """Whether a round with these probes ran in another machine state."""
    return any(
        typical[key] and abs(probe[key] / typical[key] - 1) > TOLERANCE for probe in probes for key in STATE
    )


def description() -> str:
    """The processor's name."""
    with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        names = (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
        return next(names, "unknown processor")
