"""Owns known_answer.json: what the graph answers to one short prompt, by which every machine is judged.

Invariant: nothing in it comes from ONNX Runtime, so a fault of the runtime or of the engine cannot be in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from glm_export.error import ExportError
from glm_export.graph import interpreter
from glm_export.read.config import Geometry

SCHEMA_VERSION = 1
KNOWN_ANSWER_FILE = "known_answer.json"
# The prompt is a block and a bit, so that a wrong second block is seen too.
TOKENS_BEYOND_A_BLOCK = 8
# Rows compared besides those: of more of them one may round the other way without a fault.
NUM_FIRST_ROWS = 32
NUM_TOP = 8
# How many times the expected error of a machine is forgiven: measured ones were 0.9 to 1.3 times as large.
MARGIN = 3
# For what is computed in float32; measured were 4e-6.
LEAST_TOLERANCE = 1e-3
DIGITS = 5


def write(geometry: Geometry, folder: Path, graph_file: str, names: dict[str, str]) -> None:
    """Computes the answer of the graph in the folder and writes it beside."""
    token_ids = prompt(geometry, _block_size(folder / graph_file, names))
    # What overflows is found in the end, and not a surprise on the way.
    with np.errstate(over="ignore", invalid="ignore"):
        exact, rounded = interpreter.logits(folder / graph_file, token_ids, names)
    if not np.isfinite(rounded).all():
        raise ExportError("known answer: activations overflow the graph's type; bf16 has more room than fp16")
    content = describe(token_ids, exact[:, : geometry.vocab_size], rounded[:, : geometry.vocab_size])
    (folder / KNOWN_ANSWER_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def prompt(geometry: Geometry, block_size: int) -> list[int]:
    """The same real tokens for each model of a vocabulary."""
    count = min(block_size + TOKENS_BEYOND_A_BLOCK, geometry.max_model_len)
    return np.random.default_rng(0).integers(0, geometry.vocab_size, count).tolist()


def describe(token_ids: list[int], exact: np.ndarray, rounded: np.ndarray) -> dict[str, Any]:
    """The file's content, from the logits of real ids."""
    rows = []
    errors = []
    beyond = range(max(len(exact) - TOKENS_BEYOND_A_BLOCK, 0), len(exact))
    for position in (*range(min(NUM_FIRST_ROWS, beyond.start)), *beyond):
        row, other = exact[position], rounded[position]
        mean, deviation = row.mean(), row.std()
        top = np.argsort(-row, kind="stable")[:NUM_TOP]
        errors.append(((other - other.mean()) - (row - mean))[top] / deviation)
        rows.append(
            {
                "position": position,
                "top": [[int(index), round(float(row[index]), DIGITS)] for index in top],
                "mean": round(float(mean), DIGITS),
                "deviation": round(float(deviation), DIGITS),
            }
        )
    tolerance = max(LEAST_TOLERANCE, MARGIN * float(np.sqrt(np.mean(np.square(errors)))))
    return {
        "schema_version": SCHEMA_VERSION,
        "token_ids": token_ids,
        "rows": rows,
        "tolerance": float(f"{tolerance:.2g}"),
    }


def _block_size(graph_file: Path, names: dict[str, str]) -> int:
    graph = onnx.load(graph_file, load_external_data=False).graph
    first = names["key_cache"].format(layer=0)
    cache = next(value for value in graph.input if value.name == first)
    return cache.type.tensor_type.shape.dim[1].dim_value
