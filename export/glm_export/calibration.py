"""Owns `--calibrate`: rounding 4-bit weights anew, each matrix by what enters it when the model reads a text.

Invariant: a matrix is rounded when all before it are, so that it sees what the export itself computes, and
the file has one layout with and without. One machine writes the same bytes each time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer

from glm_export.error import ExportError
from glm_export.graph import interpreter, onnx_graph
from glm_export.graph.initializers import Weights, place
from glm_export.graph.packing import Packing
from glm_export.quantise.rounding import Moments, compensated
from glm_export.read import weights
from glm_export.read.checkpoint import Source
from glm_export.read.config import Config
from glm_export.read.tokenizer import TOKENIZER_FILE
from glm_export.verify.quality import PREFIX

# Not the text that quality is measured on.
TEXT = Path(__file__).with_name("calibration.txt")
# Tokens of a sequence, and sequences that are read at most: memory grows with their product.
LENGTH = 256
NUM_SEQUENCES = 8
# Characters of a file that are read at most: few tokens are longer.
MAX_CHARACTERS = 32 * NUM_SEQUENCES * LENGTH
# Sequences of arbitrary tokens beside them, so that what the text has not is not rounded at its cost.
NUM_ARBITRARY = 4
# Panels that are rounded at once: enough rows for numpy, and few for a wide matrix's memory.
NUM_PANELS = 16


def sequences(config: Config, text: Path, folder: Path) -> list[list[int]]:
    """What to read: a text in parts of one length, each begun as the model knows it, and arbitrary tokens.

    The folder holds the tokenizer.
    """
    special = config.chat.special_tokens
    prefix = [special[name] for name in PREFIX if name in special]
    try:
        with text.open(encoding="utf-8") as file:
            content = file.read(MAX_CHARACTERS)
    except (OSError, ValueError) as error:
        raise ExportError(f"--calibration-text {text}: not a text that can be read: {error}") from None
    ids = Tokenizer.from_file(str(folder / TOKENIZER_FILE)).encode(content).ids
    length = min(LENGTH, config.geometry.max_model_len) - len(prefix)
    if length < 1:
        raise ExportError("--calibrate: --max-model-len leaves no room for a text")
    starts = range(0, len(ids) - length + 1, length)[:NUM_SEQUENCES]
    if not starts:
        raise ExportError(f"--calibration-text {text}: {len(ids)} tokens, and {length} are the least")
    parts = [ids[start : start + length] for start in starts]
    shape = (NUM_ARBITRARY, length)
    parts += np.random.default_rng(0).integers(0, config.geometry.vocab_size, shape).tolist()
    return [prefix + part for part in parts]


def refine(
    config: Config, checkpoint: Mapping[str, Source], sequences: list[list[int]], folder: Path
) -> None:
    """Rewrites the 4-bit weights of the engine's products in a folder that holds the graph."""
    written = onnx.load(folder / onnx_graph.GRAPH_FILE, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in written.initializer}
    sources = _sources(config)
    steps = interpreter.walk(
        written,
        Weights.of_folder(folder, written.initializer),
        sequences,
        onnx_graph.NAMES,
        [False] * len(sequences),
        "calibration",
    )
    # A thread a core and none in BLAS, whose sums would then depend on the number of cores.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for node, values in steps:
            if node.op_type == "QuantizedMatMul":
                name = node.input[1].removesuffix(".weight")
                entering = values[node.input[0]].astype(np.float32)
                # Squares are summed in float32, and none is larger than all.
                with np.errstate(over="ignore"):
                    norm = np.linalg.norm(entering)
                if not np.isfinite(norm):
                    raise ExportError(
                        f"--calibrate: what enters {name} is not finite, or its squares are not"
                    )
                _round(pool, node, checkpoint[sources[name]], entering, folder, tensors[node.input[1]])
            if onnx_graph.NAMES["logits"] in node.output:
                # Nobody reads them, and they are the largest values of all.
                break


def _sources(config: Config) -> dict[str, str]:
    """The checkpoint's name of each product's weight."""
    found = {"lm_head": weights.top_level(config)["lm_head"].source}
    for index in range(config.geometry.num_layers):
        table = weights.layer(config, index)
        found |= {f"layers.{index}.{role}": weight.source for role, weight in table.items()}
    return found


def _round(
    pool: ThreadPoolExecutor,
    node: NodeProto,
    weight: Source,
    entering: np.ndarray,
    folder: Path,
    tensor: TensorProto,
) -> None:
    """One matrix, some panels a thread."""
    attributes: dict[str, Any] = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    block_size = attributes["block_size"]
    packing = Packing(
        attributes["bits"],
        block_size,
        attributes["N"],
        attributes["K"],
        swiglu=attributes["epilogue"] == b"swiglu",
    )
    try:
        moments = Moments.of(entering, block_size)
    except ExportError as error:
        raise ExportError(f"{weight.name}: {error}") from None
    rounding = partial(compensated, moments=moments)
    path, offset = place(folder, tensor)
    num_panels, panel_bytes = packing.shape

    with path.open("r+b", buffering=0) as file:

        def job(first: int) -> None:
            panels = packing.panels(weight, first, min(first + NUM_PANELS, num_panels), rounding)
            content = panels.tobytes()
            if os.pwrite(file.fileno(), content, offset + first * panel_bytes) != len(content):
                raise ExportError(f"{path}: could not be written")

        list(pool.map(job, range(0, num_panels, NUM_PANELS)))
