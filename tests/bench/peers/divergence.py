"""Owns what a contender's precision costs: the Kullback-Leibler divergence of its distributions to float32's.

Invariant: everybody is measured at the same positions of the same ids, as served: weights, kernels, KV cache.
"""

import json
import shutil
from pathlib import Path

import numpy as np

from .contender import Contender
from .glmserve import Glmserve
from .models import Model

NUM_IDS = 200
# The first positions see next to no context.
POSITIONS = list(range(20, NUM_IDS, 4))
REFERENCE = "fp32"


def reference(model: Model) -> np.ndarray:
    """Float32's distributions, kept beside the weights."""
    path = model.folder / "reference.npy"
    if not is_current(path, [model.checkpoint / "config.json"]):
        exact = Glmserve(REFERENCE)
        exact.prepare(model)
        np.save(path, exact.logprobs(model, model.sample_ids(NUM_IDS), POSITIONS))
        # The largest of all forms, and of no further use.
        shutil.rmtree(exact.folder(model))
    return np.load(path)


def measure(model: Model, contender: Contender) -> dict:
    """Mean divergence in nats, its standard error, and how often the first choice is the same."""
    exact = reference(model)
    path = model.folder / f"{contender.name.replace(' ', '-')}.divergence.json"
    if not is_current(path, [model.folder / "reference.npy", *contender.sources(model)]):
        found = contender.logprobs(model, model.sample_ids(NUM_IDS), POSITIONS)
        path.write_text(json.dumps(compare(exact, found)))
    return json.loads(path.read_text())


def is_current(path: Path, sources: list[Path]) -> bool:
    """Whether a file is there and newer than all it was made from."""
    return path.is_file() and all(path.stat().st_mtime >= source.stat().st_mtime for source in sources)


def compare(exact: np.ndarray, found: np.ndarray) -> dict:
    """The figures of two sets of log-probabilities, [positions, vocabulary]."""
    weight = np.exp(exact)
    # Where the exact distribution has nothing, a difference weighs nothing.
    terms = np.where(weight > 0, weight * (exact - found), 0.0)
    each = terms.sum(axis=-1)
    return {
        "kl": float(each.mean()),
        "kl_error": float(each.std(ddof=1) / np.sqrt(len(each))),
        "same_first": float((exact.argmax(axis=-1) == found.argmax(axis=-1)).mean()),
    }
