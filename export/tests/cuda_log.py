"""Owns the reading of what the CUDA double logs: the calls of a step, kernels by short names.

The names are the real library's, in the real order; grids are those that it chose.
"""

import re
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass

LOG = "GLMSERVE_STUB_LOG"


@dataclass(frozen=True)
class Call:
    """One call: its kind (kernel, gemm, copy, set, malloc, free, wait, event, graph), and what of."""

    kind: str
    what: str = ""


@contextmanager
def recorded(monkeypatch, path):
    """Gives a list that has the calls of the block after it."""
    path.unlink(missing_ok=True)
    monkeypatch.setenv(LOG, str(path))
    calls = []
    try:
        yield calls
    finally:
        monkeypatch.delenv(LOG)
    with path.open() as log:
        plain = subprocess.run(["c++filt"], stdin=log, check=True, capture_output=True, text=True).stdout
    calls.extend(_call(line) for line in plain.splitlines())


def _call(line):
    kind, _, what = line.partition(" ")
    return Call(kind, short(what) if kind in ("kernel", "gemm") else what)


def short(name):
    """A kernel's name without types, namespaces and arguments, or its operator's if it is elementwise."""
    if operation := re.search(r"::OP_(\w+)", name):
        return operation[1]
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.match(r"[\w:]+", name)[0].split("::")[-1]


def launches(calls):
    """Short names of all that computes, in order."""
    return [call.what for call in calls if call.kind in ("kernel", "gemm")]


def one_layer(names):
    """What one layer launches: from behind one write to the cache to the next, which is a layer further."""
    writes = [
        index
        for index, name in enumerate(names)
        if name.startswith(CACHE_WRITE) and not names[index + 1].startswith(CACHE_WRITE)
    ]
    return names[writes[0] + 1 : writes[1] + 1]


def head(names):
    """What is launched behind the last norm."""
    last = max(index for index, name in enumerate(names) if name.startswith("SkipLayerNorm"))
    return names[last + 1 :]


# The last of its kind in a layer is followed by attention.
CACHE_WRITE = "ReshapeAndCache"
