"""Owns what many rounds come to: medians and spreads of those that ran in the machine's usual state.

Invariant: nothing is left out silently. Dropped rounds are counted, and where all would be, all are kept and
the cell says that it is noisy.
"""

from dataclasses import dataclass
from statistics import median

from . import machine

# Figure of a cell: where it lies in a sample.
FIGURES = {
    "output": ("run", "output_tokens_per_s"),
    "total": ("run", "total_tokens_per_s"),
    "ttft_p50": ("run", "ttft_ms", "p50"),
    "ttft_p99": ("run", "ttft_ms", "p99"),
    "itl_p50": ("run", "itl_ms", "p50"),
    "itl_p99": ("run", "itl_ms", "p99"),
    "itl_max": ("run", "itl_ms", "max"),
    "memory": ("memory_mib",),
    "ready": ("ready_s",),
}
BROKEN = ("num_failed", "num_truncated", "num_empty", "num_short", "num_without_usage")


@dataclass(frozen=True)
class Range:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> "Range | None":
        """None if no round has it."""
        return Range(median(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class Cell:
    """One contender under one load."""

    figures: dict[str, Range | None]
    num_kept: int
    num_dropped: int
    is_noisy: bool
    # Streams that broke or came short, and rounds without figures, in words.
    faults: list[str]


def cells(samples: list[dict], typical: dict) -> dict[tuple[str, str], Cell]:
    """By contender and load, in the order of the samples."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for sample in samples:
        groups.setdefault((sample["contender"], sample["load"]), []).append(sample)
    return {key: _cell(group, typical) for key, group in groups.items()}


def _cell(group: list[dict], typical: dict) -> Cell:
    measured = [sample for sample in group if "run" in sample]
    usual = [sample for sample in measured if not machine.is_off(sample["probes"], typical)]
    is_noisy = not usual and bool(measured)
    kept = usual or measured
    faults = [sample["error"] for sample in group if "error" in sample]
    for kind in BROKEN:
        count = sum(sample["run"][kind] for sample in measured)
        if count:
            faults.append(f"{count} {kind.removeprefix('num_').replace('_', ' ')}")
    figures = {name: Range.of(_values(kept, path)) for name, path in FIGURES.items()}
    return Cell(figures, len(kept), len(measured) - len(kept), is_noisy, faults)


def _values(samples: list[dict], path: tuple[str, ...]) -> list[float]:
    values = []
    for sample in samples:
        value = sample
        for key in path:
            value = value.get(key) if value is not None else None
        if value is not None:
            values.append(value)
    return values


@dataclass(frozen=True)
class Headline:
    """One of ours beside one peer: ratios of output by load, or why there are none."""

    ours: str
    peer: str
    ratios: dict[str, float]
    refused: str | None


def headlines(result: dict, table: dict[tuple[str, str], Cell]) -> list[Headline]:
    """Every pair of ours and a peer. A faster server that computes something worse is no faster."""
    known = {name: row for name, row in result["contenders"].items() if "kl" in row}
    found = []
    for ours in (name for name, row in known.items() if row["is_ours"]):
        for peer in (name for name, row in known.items() if not row["is_ours"]):
            refused = None
            if known[ours]["kl"] > known[peer]["kl"]:
                refused = f"KL {known[ours]['kl']:.4f} is worse than {known[peer]['kl']:.4f}"
            found.append(Headline(ours, peer, _ratios(ours, peer, table), refused))
    return found


def _ratios(ours: str, peer: str, table: dict[tuple[str, str], Cell]) -> dict[str, float]:
    ratios = {}
    for name, load in table:
        if name == ours and (peer, load) in table:
            mine, other = table[ours, load].figures["output"], table[peer, load].figures["output"]
            if mine and other and other.median > 0:
                ratios[load] = mine.median / other.median
    return ratios
