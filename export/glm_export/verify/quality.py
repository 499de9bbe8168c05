"""Owns `--quality`: what an export's rounding costs, measured against the checkpoint itself in float32.

Invariant: both sides are computed by the interpreter, a few rows of a weight at a time, so that neither torch
nor a float32 copy of the weights is needed; the export's values are rounded as its kernels round them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto
from tokenizers import Tokenizer

from glm_export.error import ExportError
from glm_export.graph import fusion, interpreter, onnx_graph
from glm_export.graph.initializers import Weights
from glm_export.graph.manifest import MANIFEST_FILE
from glm_export.graph.product_weights import ReadRows, weight_rows
from glm_export.graph.target import Target
from glm_export.read import config, weights

TEXT = Path(__file__).with_name("quality.txt")
# Tokens of the text that are read at most.
MAX_TOKENS = 512
# Put before a text where a tokenizer has them: the family's models have never seen one without.
PREFIX = ("[gMASK]", "sop", "<sop>")
# Elements of a weight that are compared at once.
CHUNK = 1 << 18


@dataclass(frozen=True)
class Quality:
    """What was found; logits are those of real ids at every position of the text but the last."""

    num_tokens: int
    # Root of the squared error over that of the squared weights: of each layer, and of the head.
    weight_errors: dict[str, float]
    perplexity: float
    reference_perplexity: float
    # Mean over positions, in nats, from the checkpoint's distribution to the export's.
    divergence: float
    # Share of positions with the same most likely token.
    agreement: float
    num_bytes: int

    def __str__(self) -> str:
        errors = "\n".join(
            f"{name}: relative error {error:.5f}" for name, error in self.weight_errors.items()
        )
        change = self.perplexity / self.reference_perplexity - 1
        return (
            f"{errors}\n{self.num_tokens} tokens: perplexity {self.perplexity:.3f}, "
            f"{self.reference_perplexity:.3f} in float32 ({change:+.1%}); KL divergence "
            f"{self.divergence:.5f}; same first choice {self.agreement:.1%}"
        )


class Reference:
    """The checkpoint in float32: its weights, and its distributions over the text."""

    def __init__(self, checkpoint: Path, exported: Path, adapter: Path | None = None) -> None:
        content = _manifest(exported)
        settings = config.load(checkpoint, content["geometry"]["max_model_len"])
        tensors = weights.open_checkpoint(settings, checkpoint, adapter)
        self.graph, data = onnx_graph.build(settings, tensors, None, Target("fp32"))
        self.weights = Weights(self.graph.initializer, data.rows)
        self.ids = token_ids(exported, content)
        (logits,) = interpreter.run(self.graph, self.weights, self.ids, onnx_graph.NAMES, [False], "float32")
        self.vocab_size = settings.geometry.vocab_size
        self.expected = _log_softmax(logits[:-1, : self.vocab_size])

    def compare(self, exported: Path) -> Quality:
        """What an export of the checkpoint makes of the same text."""
        written = onnx.load(exported / onnx_graph.GRAPH_FILE, load_external_data=False).graph
        written_weights = Weights.of_folder(exported, written.initializer)
        names = _manifest(exported)["graph"]["names"]
        (rounded,) = interpreter.run(written, written_weights, self.ids, names, [True], "export")
        found = _log_softmax(rounded[:-1, : self.vocab_size])
        return Quality(
            num_tokens=len(self.ids),
            weight_errors=_weight_errors(self.graph, self.weights, written, written_weights),
            perplexity=perplexity(found, self.ids),
            reference_perplexity=perplexity(self.expected, self.ids),
            divergence=float((np.exp(self.expected) * (self.expected - found)).sum(axis=-1).mean()),
            agreement=float((self.expected.argmax(axis=-1) == found.argmax(axis=-1)).mean()),
            num_bytes=sum(path.stat().st_size for path in exported.iterdir()),
        )


def measure(checkpoint: Path, exported: Path, adapter: Path | None = None) -> Quality:
    """Compares an exported folder with the checkpoint it was made of."""
    return Reference(checkpoint, exported, adapter).compare(exported)


def _manifest(exported: Path) -> dict[str, Any]:
    return json.loads((exported / MANIFEST_FILE).read_text(encoding="utf-8"))


def token_ids(exported: Path, content: dict[str, Any]) -> list[int]:
    """The text that is shipped, as far as the model reads."""
    tokenizer = Tokenizer.from_file(str(exported / content["tokenizer"]["file"]))
    special = content["chat"]["special_tokens"]
    prefix = [special[text] for text in PREFIX if text in special]
    ids = prefix + tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids
    return ids[: min(MAX_TOKENS, content["geometry"]["max_model_len"])]


def _weight_errors(
    exact: GraphProto, source: Weights, written_graph: GraphProto, written: Weights
) -> dict[str, float]:
    """By layer, since that is where a fault or an outlier shows."""
    nodes = fusion.expanded(written_graph.node)
    by_name = {_product(node): node for node in nodes if len(node.input) > 1}
    sums: dict[str, np.ndarray] = {}
    for node in exact.node:
        read = weight_rows(node, source)
        if read is None:
            continue
        name = _product(node)
        read_other = _written_rows(name, source.shape(node.input[1])[0], by_name, written)
        order = f"{name}.order"
        columns = written.rows(order) if order in written else slice(None)
        num_rows, width = source.shape(node.input[1])
        step = max(1, CHUNK // width)
        layer = ".".join(name.split(".")[:2])
        total = sums.setdefault(layer, np.zeros(2))
        for first in range(0, num_rows, step):
            rows = read(first, step)[:, columns]
            total += [np.square(rows - read_other(first, step)).sum(), np.square(rows).sum()]
    return {layer: float(np.sqrt(error / norm)) for layer, (error, norm) in sums.items()}


def _written_rows(name: str, num_rows: int, by_name: dict[str, NodeProto], written: Weights) -> ReadRows:
    """How to read a product's weight, or that of the two in its place."""
    prefix = name.removesuffix("gate_up")
    parts = [name] if name in by_name else [f"{prefix}gate", f"{prefix}up"]
    reads = [weight_rows(by_name[part], written) for part in parts if part in by_name]
    if len(reads) != len(parts) or None in reads:
        raise ExportError(f"{name}: the exported graph has no such product")
    if len(reads) == 1:
        return reads[0]
    gate, up = reads
    half = num_rows // 2

    def read(first: int, count: int) -> np.ndarray:
        end = min(first + count, num_rows)
        parts = [gate(first, min(end, half) - first)] if first < half else []
        if end > half:
            start = max(first, half)
            parts.append(up(start - half, end - start))
        return np.concatenate(parts)

    return read


def _product(node: NodeProto) -> str:
    """What its weight is called, whatever parts that is kept in."""
    return node.input[1].rpartition(".")[0]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def perplexity(log_probabilities: np.ndarray, ids: list[int]) -> float:
    """Of the ids, each after those before it."""
    return float(np.exp(-log_probabilities[np.arange(len(ids) - 1), ids[1:]].mean()))
