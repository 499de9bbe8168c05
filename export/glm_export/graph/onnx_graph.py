"""Owns the ONNX graph: the network's nodes in order; the weights flow past it into the external data file.

Invariant: the target's provider has a kernel in ONNX Runtime for every node, except PagedAttention,
QuantizedMatMul and PostAttention on the CPU, which the engine brings itself. Where those multiply, nothing
that ONNX Runtime computes rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, TensorProto, helper

from glm_export import __version__
from glm_export.graph import candidates, fusion, interface
from glm_export.graph.external_data import ExternalData
from glm_export.graph.fusion import MICROSOFT, OWN
from glm_export.graph.interface import NAMES
from glm_export.graph.nodes import Nodes, narrowed
from glm_export.graph.products import AnyScheme, Products
from glm_export.graph.target import Target
from glm_export.output_folder import require_space
from glm_export.read import weights
from glm_export.read.checkpoint import Source
from glm_export.read.config import Config

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
OPSET = 21
IR_VERSION = 10


def write(
    config: Config,
    checkpoint: Mapping[str, Source],
    scheme: AnyScheme | None,
    target: Target,
    folder: Path,
) -> None:
    """Writes the graph and its weights; without a scheme the weights have the activations' type."""
    graph, data = build(config, checkpoint, scheme, target)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*version) for version in (("", OPSET), (MICROSOFT, 1), (OWN, 1))],
        ir_version=IR_VERSION,
        producer_name="glm-export",
        producer_version=__version__,
    )
    require_space(folder, data.num_bytes)
    data.write(folder)
    onnx.save(model, folder / GRAPH_FILE)


def build(
    config: Config, checkpoint: Mapping[str, Source], scheme: AnyScheme | None, target: Target
) -> tuple[GraphProto, ExternalData]:
    """The graph, and its weights before any was read."""
    builder = _Builder(config, checkpoint, scheme, target)
    builder.decoder()
    graph = helper.make_graph(
        list(fusion.fused(builder.nodes.nodes)),
        config.name,
        interface.inputs(config.geometry, target),
        interface.outputs(config.geometry, target),
        builder.nodes.data.initializers,
    )
    return graph, builder.nodes.data


def rotary_tables(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, [max_model_len, rotary_dim / 2].

    Angles are rounded to float32 as the authors' code rounds them: the weights were trained with that error.
    """
    width = config.geometry.rotary_dim
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    theta = (1 / config.rope_base ** exponents.astype(np.float64)).astype(np.float32)
    positions = np.arange(config.geometry.max_model_len, dtype=np.float32)
    positions /= np.float32(config.position_divisor)
    angles = np.outer(positions, theta).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


class _Builder:
    """Writes the network; methods return the name of what their nodes compute."""

    def __init__(
        self,
        config: Config,
        checkpoint: Mapping[str, Source],
        scheme: AnyScheme | None,
        target: Target,
    ) -> None:
        self.config = config
        self.target = target
        self.dtype = target.dtype
        self.checkpoint = checkpoint
        self.scheme = scheme
        self.nodes = Nodes(DATA_FILE)
        self.products = Products(self.nodes, checkpoint, scheme, target)

    def decoder(self) -> None:
        """The whole network: packed token ids in, logits of the wanted rows out."""
        table = weights.top_level(self.config)
        cos, sin = rotary_tables(self.config)
        self.nodes.data.add("rotary.cos", cos.astype(self.dtype))
        self.nodes.data.add("rotary.sin", sin.astype(self.dtype))

        residual = self.embedding(table["embedding"].source)
        update = None
        for index in range(self.config.geometry.num_layers):
            residual, update = self.layer(index, residual, update)
        hidden, _ = self.norm("final_norm", table["final_norm"].source, residual, update)
        # Quantised like the rest: it is read whole for every token, and one scheme a folder keeps
        # `precision` true. At 4 bits this costs some quality, as measured in the README.
        if self.dtype == np.float32:
            logits = self.products.linear(
                "lm_head", table["lm_head"].source, None, hidden, output=NAMES["logits"]
            )
        else:
            rows = self.products.linear("lm_head", table["lm_head"].source, None, hidden)
            logits = self.nodes.add("Cast", [rows], NAMES["logits"], to=TensorProto.FLOAT)
        if self.target.output == "topk":
            candidates.add(self.nodes, self.config.geometry, logits)

    def embedding(self, source: str) -> str:
        tensor = self.checkpoint[source]
        # Half precision is what the authors publish, so it is exact there and halves the largest tensor.
        dtype = np.float16 if self.scheme is not None and self.dtype == np.float32 else self.dtype
        name = self.nodes.keep("embedding.weight", tensor, dtype)
        rows = self.nodes.add("Gather", [name, NAMES["token_ids"]], "embedding.rows", axis=0)
        if dtype == self.dtype:
            return rows
        return self.nodes.add("Cast", [rows], "embedding.float32", to=TensorProto.FLOAT)

    def layer(self, index: int, residual: str, update: str | None) -> tuple[str, str]:
        """One decoder layer; returns the residual stream and what the next norm adds to it."""
        g, table, prefix = self.config.geometry, weights.layer(self.config, index), f"layers.{index}."
        hidden, residual = self.norm(f"{prefix}input_norm", table["input_norm"].source, residual, update)
        bias = table["qkv_bias"].source if "qkv_bias" in table else None
        qkv = self.products.linear(f"{prefix}qkv", table["qkv"].source, bias, hidden)
        attention = self.attention(index, qkv)
        if index == g.num_layers - 1:
            # Keys and values are in the cache now: from here on only the wanted rows matter.
            wanted = NAMES["logits_indices"]
            attention = self.nodes.add("Gather", [attention, wanted], "wanted.attention", axis=0)
            residual = self.nodes.add("Gather", [residual, wanted], "wanted.residual", axis=0)
        dense = self.products.linear(f"{prefix}dense", table["dense"].source, None, attention)
        hidden, residual = self.norm(f"{prefix}post_norm", table["post_norm"].source, residual, dense)
        product = self.products.gated(prefix, table["gate_up"].source, hidden)
        return residual, self.products.linear(f"{prefix}down", table["down"].source, None, product)

    def attention(self, index: int, qkv: str) -> str:
        g = self.config.geometry
        packed = [qkv, "", ""]
        caches = [NAMES[role].format(layer=index) for role in ("key_cache", "value_cache")]
        batch = [NAMES[role] for role in ("cumulative_sequence_length", "past_seqlens", "block_table")]
        rotary = ["rotary.cos", "rotary.sin"]
        no_sink_norms = [""] * 3
        return self.nodes.add(
            "PagedAttention",
            [
                *packed,
                *caches,
                *batch,
                *rotary,
                NAMES["slot_mapping"],
                *no_sink_norms,
                *self.cache_scales(index),
                NAMES["attention_metadata"],
            ],
            f"layers.{index}.attention",
            MICROSOFT,
            num_heads=g.num_attention_heads,
            kv_num_heads=g.num_kv_heads,
            scale=g.head_dim**-0.5,
            do_rotary=1,
            rotary_interleaved=1,
            **self.cache_attributes(),
        )

    def cache_scales(self, index: int) -> list[str]:
        """Names of what a layer's keys and values are divided by, empty where they are stored as they are."""
        if not self.target.has_quantised_cache:
            return ["", ""]
        g = self.config.geometry
        # One for each channel, which are measured when the graph is there, or one a layer that was given.
        measured = np.ones((g.num_kv_heads, 1, g.head_dim), np.float32)
        sides = {"key": self.target.key_scales, "value": self.target.value_scales}
        return [
            self.nodes.data.add(
                f"layers.{index}.{side}_scale", np.array([given[index]], np.float32) if given else measured
            )
            for side, given in sides.items()
        ]

    def cache_attributes(self) -> dict[str, str]:
        """What tells the kernel of a quantised cache."""
        if not self.target.has_quantised_cache:
            return {}
        granularity = "PER_TENSOR" if self.target.key_scales else "PER_CHANNEL"
        names = {f"{side}_quant_type": granularity for side in "kv"}
        if self.target.kv_cache == "int4":
            names |= {f"{side}_cache_dtype": "int4" for side in "kv"}
        return names

    def norm(self, name: str, source: str, residual: str, update: str | None) -> tuple[str, str]:
        """RMSNorm of residual + update; returns the normed rows and the sum."""
        scale = self.nodes.data.add(
            f"{name}.weight", narrowed(source, self.checkpoint[source].rows(), self.dtype)
        )
        epsilon = self.config.norm_epsilon
        if update is None:
            normed = self.nodes.add(
                "SimplifiedLayerNormalization", [residual, scale], name, axis=-1, epsilon=epsilon
            )
            return normed, residual
        total = f"{name}.residual"
        outputs = [name, "", "", total]
        inputs = [update, residual, scale]
        self.nodes.add_many(
            "SkipSimplifiedLayerNormalization", inputs, outputs, name, MICROSOFT, epsilon=epsilon
        )
        return name, total
