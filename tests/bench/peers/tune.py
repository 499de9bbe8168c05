"""Owns `--tune`: each contender at its best of a few settings, by the geometric mean of its output."""

import json
import sys
from itertools import product
from math import prod
from pathlib import Path

from .contender import Settings
from .loads import Load
from .models import Model
from .rounds import Bench


def run(bench: Bench, chosen: list[Load]) -> None:
    """Tries every combination under the loads, prints it, and keeps the best for later runs."""
    best: dict[str, Settings] = read(bench.model)
    for contender in bench.contenders:
        scores = []
        for values in product(*contender.grid.values()):
            settings = dict(zip(contender.grid, values, strict=True))
            samples = bench.turn(contender, settings, chosen, 0)
            outputs = [sample["run"]["output_tokens_per_s"] for sample in samples if "run" in sample]
            score = prod(outputs) ** (1 / len(chosen)) if len(outputs) == len(chosen) else 0.0
            scores.append((score, settings))
            print(
                f"{contender.name} {settings}: {score:.1f} {[round(value, 1) for value in outputs]}",
                flush=True,
            )
        score, settings = max(scores, key=lambda pair: pair[0])
        if score > 0:
            best[contender.name] = settings
    _path(bench.model).write_text(json.dumps(best, indent=1) + "\n")


def read(model: Model) -> dict[str, Settings]:
    """What an earlier `--tune` chose on this machine, by contender."""
    path = _path(model)
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        sys.exit(f"{path}: {error}; remove it")


def _path(model: Model) -> Path:
    return model.folder / "settings.json"
