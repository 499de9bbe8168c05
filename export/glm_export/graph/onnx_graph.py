"""Owns the ONNX graph: nodes, names and order; the weights flow past it into the external data file.

Invariant: the target's provider has a kernel in ONNX Runtime for every node, except PagedAttention,
QuantizedMatMul and PostAttention on the CPU, which the engine brings itself. Where those multiply, nothing
that ONNX Runtime computes rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper

from glm_export import __version__
from glm_export.error import ExportError
from glm_export.graph import fusion, interface
from glm_export.graph.external_data import Content, ExternalData
from glm_export.graph.fusion import MICROSOFT, OWN
from glm_export.graph.interface import NAMES, TOPK_NAMES
from glm_export.graph.packing import BLOCK_SIZES, COLUMNS, Packing
from glm_export.graph.target import Target
from glm_export.output_folder import require_space
from glm_export.quantise.quantize import Scheme
from glm_export.read import weights
from glm_export.read.checkpoint import Rows, Source
from glm_export.read.config import Config
from glm_export.read.prequantised import Matrix

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
OPSET = 21
IR_VERSION = 10
# Activations become int8 inside the kernel: at 8 bits any other level dequantises the weights at each call.
INT8_ACTIVATIONS = 4


def write(
    config: Config, checkpoint: Mapping[str, Source], scheme: Scheme | None, target: Target, folder: Path
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
    config: Config, checkpoint: Mapping[str, Source], scheme: Scheme | None, target: Target
) -> tuple[GraphProto, ExternalData]:
    """The graph, and its weights before any was read."""
    builder = _Builder(config, checkpoint, scheme, target)
    builder.decoder()
    graph = helper.make_graph(
        list(fusion.fused(builder.nodes)),
        config.name,
        interface.inputs(config.geometry, target),
        interface.outputs(config.geometry, target),
        builder.data.initializers,
    )
    return graph, builder.data


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


def _narrowed(source: str, rows: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    largest = np.abs(rows).max(initial=0)
    if largest > float(ml_dtypes.finfo(dtype).max):
        raise ExportError(f"{source}: {largest} is beyond the largest {np.dtype(dtype).name}")
    return rows.astype(dtype)


class _Builder:
    """Collects nodes and initialisers; methods return the name of what they compute."""

    def __init__(
        self, config: Config, checkpoint: Mapping[str, Source], scheme: Scheme | None, target: Target
    ) -> None:
        self.config = config
        self.target = target
        self.dtype = target.dtype
        self.checkpoint = checkpoint
        self.scheme = scheme
        self.nodes: list[NodeProto] = []
        self.data = ExternalData(DATA_FILE)

    def decoder(self) -> None:
        """The whole network: packed token ids in, logits of the wanted rows out."""
        table = weights.top_level(self.config)
        cos, sin = rotary_tables(self.config)
        self.data.add("rotary.cos", cos.astype(self.dtype))
        self.data.add("rotary.sin", sin.astype(self.dtype))

        residual = self.embedding(table["embedding"].source)
        update = None
        for index in range(self.config.geometry.num_layers):
            residual, update = self.layer(index, residual, update)
        hidden, _ = self.norm("final_norm", table["final_norm"].source, residual, update)
        # Quantised like the rest: it is read whole for every token, and one scheme a folder keeps
        # `precision` true. At 4 bits this costs some quality, as measured in the README.
        if self.dtype == np.float32:
            logits = self.linear("lm_head", table["lm_head"].source, None, hidden, output=NAMES["logits"])
        else:
            rows = self.linear("lm_head", table["lm_head"].source, None, hidden)
            logits = self.node("Cast", [rows], NAMES["logits"], to=TensorProto.FLOAT)
        if self.target.output == "topk":
            self.candidates(logits)

    def candidates(self, logits: str) -> None:
        """The best of each row and the weight of all, so that whole rows need not leave a GPU."""
        g = self.config.geometry
        count = self.constant("topk.count", [interface.num_candidates(g)])
        start, axis = self.constant("topk.start", [0]), self.constant("topk.axis", [1])
        real = logits
        if g.vocab_size < g.padded_vocab_size:
            end = self.constant("topk.vocab_size", [g.vocab_size])
            real = self.node("Slice", [logits, start, end, axis], "topk.real")
        values = TOPK_NAMES["topk_values"]
        self.nodes.append(
            helper.make_node("TopK", [real, count], [values, "topk.ids"], "topk", axis=1, sorted=1)
        )
        self.node("Cast", ["topk.ids"], TOPK_NAMES["topk_ids"], to=TensorProto.INT32)
        # Spelt out, since ReduceLogSumExp needs cuDNN on the CUDA provider and these do not.
        one = self.constant("topk.one", [1])
        best = self.node("Slice", [values, start, one, axis], "topk.best")
        shifted = self.node("Sub", [real, best], "topk.shifted")
        exponentials = self.node("Exp", [shifted], "topk.exponentials")
        total = self.node("ReduceSum", [exponentials, axis], "topk.total", keepdims=1)
        log = self.node("Log", [total], "topk.log")
        self.node("Add", [log, best], TOPK_NAMES["logsumexp"])

    def constant(self, name: str, values: list[int]) -> str:
        """A few whole numbers that shapes depend on; in the graph itself, where shape inference sees them."""
        self.data.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def embedding(self, source: str) -> str:
        tensor = self.checkpoint[source]
        # Half precision is what the authors publish, so it is exact there and halves the largest tensor.
        dtype = np.float16 if self.scheme is not None and self.dtype == np.float32 else self.dtype
        name = self.data.reserve("embedding.weight", dtype, tensor.shape)
        self.keep(name, tensor, dtype)
        rows = self.node("Gather", [name, NAMES["token_ids"]], "embedding.rows", axis=0)
        if dtype == self.dtype:
            return rows
        return self.node("Cast", [rows], "embedding.float32", to=TensorProto.FLOAT)

    def layer(self, index: int, residual: str, update: str | None) -> tuple[str, str]:
        """One decoder layer; returns the residual stream and what the next norm adds to it."""
        g, table, prefix = self.config.geometry, weights.layer(self.config, index), f"layers.{index}."
        hidden, residual = self.norm(f"{prefix}input_norm", table["input_norm"].source, residual, update)
        bias = table["qkv_bias"].source if "qkv_bias" in table else None
        qkv = self.linear(f"{prefix}qkv", table["qkv"].source, bias, hidden)
        attention = self.attention(index, qkv)
        if index == g.num_layers - 1:
            # Keys and values are in the cache now: from here on only the wanted rows matter.
            wanted = NAMES["logits_indices"]
            attention = self.node("Gather", [attention, wanted], "wanted.attention", axis=0)
            residual = self.node("Gather", [residual, wanted], "wanted.residual", axis=0)
        dense = self.linear(f"{prefix}dense", table["dense"].source, None, attention)
        hidden, residual = self.norm(f"{prefix}post_norm", table["post_norm"].source, residual, dense)
        product = self.gated(prefix, table["gate_up"].source, hidden)
        return residual, self.linear(f"{prefix}down", table["down"].source, None, product)

    def gated(self, prefix: str, source: str, rows: str) -> str:
        """silu(rows @ gate.T) * (rows @ up.T), where the weight holds one after the other."""
        if self.is_packed(source):
            return self.packed(f"{prefix}gate_up", source, None, rows, f"{prefix}product", swiglu=True)
        tensor = self.checkpoint[source]
        if self.target.provider == "cuda" and not isinstance(tensor, Matrix):
            # Two products, since a Split would copy all that one wrote.
            half = tensor.shape[0] // 2
            gate = self.product(f"{prefix}gate", Rows(tensor, 0, half), "", rows, f"{prefix}gate")
            up = self.product(f"{prefix}up", Rows(tensor, half, half), "", rows, f"{prefix}up")
        else:
            gate_up = self.linear(f"{prefix}gate_up", source, None, rows)
            gate, up = f"{prefix}gate", f"{prefix}up"
            self.nodes.append(
                helper.make_node("Split", [gate_up], [gate, up], f"{prefix}split", axis=1, num_outputs=2)
            )
        # QuickGelu is x * sigmoid(alpha * x): SiLU at alpha 1, in one kernel.
        silu = self.node("QuickGelu", [gate], f"{prefix}silu", MICROSOFT, alpha=1.0)
        return self.node("Mul", [silu, up], f"{prefix}product")

    def attention(self, index: int, qkv: str) -> str:
        g = self.config.geometry
        packed = [qkv, "", ""]
        caches = [NAMES[role].format(layer=index) for role in ("key_cache", "value_cache")]
        batch = [NAMES[role] for role in ("cumulative_sequence_length", "past_seqlens", "block_table")]
        rotary = ["rotary.cos", "rotary.sin"]
        no_sink_norms = [""] * 3
        return self.node(
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
        sides = {"key": self.target.key_scales, "value": self.target.value_scales}
        return [
            self.data.add(f"layers.{index}.{side}_scale", np.array([scales[index]], np.float32))
            for side, scales in sides.items()
        ]

    def cache_attributes(self) -> dict[str, str]:
        """What tells the kernel of a quantised cache."""
        if not self.target.has_quantised_cache:
            return {}
        names = {f"{side}_quant_type": "PER_TENSOR" for side in "kv"}
        if self.target.kv_cache == "int4":
            names |= {f"{side}_cache_dtype": "int4" for side in "kv"}
        return names

    def norm(self, name: str, source: str, residual: str, update: str | None) -> tuple[str, str]:
        """RMSNorm of residual + update; returns the normed rows and the sum."""
        scale = self.data.add(f"{name}.weight", _narrowed(source, self.checkpoint[source].rows(), self.dtype))
        epsilon = self.config.norm_epsilon
        if update is None:
            normed = self.node(
                "SimplifiedLayerNormalization", [residual, scale], name, axis=-1, epsilon=epsilon
            )
            return normed, residual
        total = f"{name}.residual"
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [update, residual, scale],
                [name, "", "", total],
                name,
                domain=MICROSOFT,
                epsilon=epsilon,
            )
        )
        return name, total

    def linear(self, name: str, source: str, bias: str | None, rows: str, output: str | None = None) -> str:
        """rows @ weight.T + bias."""
        if self.is_packed(source):
            return self.packed(name, source, bias, rows, output or name)
        addend = np.zeros(0) if bias is None else self.checkpoint[bias].rows()
        bias_name = ""
        if addend.any():
            bias_name = self.data.add(f"{name}.bias", _narrowed(bias, addend, self.dtype))
        return self.product(name, self.checkpoint[source], bias_name, rows, output or name)

    def product(self, name: str, tensor: Source, bias_name: str, rows: str, output: str) -> str:
        """rows @ tensor.T + bias by a node of ONNX Runtime."""
        if self.scheme is None:
            weight = self.data.reserve(f"{name}.weight", self.dtype, tensor.shape)
            self.keep(weight, tensor, self.dtype)
            inputs = [rows, weight, *([bias_name] if bias_name else [])]
            return self.node("Gemm", inputs, output, transB=1)

        num_rows, width = tensor.shape
        is_taken = isinstance(tensor, Matrix)
        scheme = tensor.scheme if is_taken else self.scheme.fitted(tensor.name, width)
        if is_taken and self.scheme.bits != scheme.bits:
            raise ExportError(
                f"{tensor.name} is quantised to {scheme.bits} bits already: "
                f"choose --precision int{scheme.bits}"
            )
        arrays = {
            part: self.data.reserve(f"{name}.{part}", self.dtype if part == "scales" else np.uint8, shape)
            for part, shape in scheme.shapes(num_rows, width).items()
        }

        def quantised(first: int, end: int) -> dict[str, np.ndarray]:
            parts = tensor.arrays(first, end) if is_taken else scheme.quantize(tensor.rows(first, end))
            parts["scales"] = parts["scales"].astype(self.dtype)
            return {arrays[part]: array for part, array in parts.items()}

        self.data.fill(Content.of(tensor, quantised), *arrays.values())
        if is_taken:
            rows = self.ordered(name, tensor, rows)
        inputs = [rows, arrays["packed"], arrays["scales"], arrays.get("zeros", ""), "", bias_name]
        while not inputs[-1]:
            inputs.pop()
        return self.node(
            "MatMulNBits",
            inputs,
            output,
            MICROSOFT,
            K=width,
            N=num_rows,
            bits=scheme.bits,
            block_size=scheme.block_size,
            # CUDA's kernels have one way; an attribute that is not there says so.
            **({"accuracy_level": INT8_ACTIVATIONS} if self.target.provider == "cpu" else {}),
        )

    def is_packed(self, source: str) -> bool:
        """Whether a weight goes to the engine's own product; codes that are taken as they are do not."""
        is_ours = self.scheme is not None and self.target.kernel == "glmserve"
        return is_ours and not isinstance(self.checkpoint[source], Matrix)

    def packed(
        self, name: str, source: str, bias: str | None, rows: str, output: str, swiglu: bool = False
    ) -> str:
        """rows @ weight.T + bias by QuantizedMatMul; with swiglu as `gated`."""
        tensor = self.checkpoint[source]
        num_rows, width = tensor.shape
        scheme = self.scheme.fitted(source, width)
        if scheme.block_size not in BLOCK_SIZES:
            raise ExportError(
                f"{source}: rows of {width} values in blocks of {scheme.block_size}; QuantizedMatMul has "
                f"blocks of {', '.join(map(str, BLOCK_SIZES))}: choose --kernel ort"
            )
        packing = Packing(scheme.bits, scheme.block_size, num_rows, width, swiglu)
        weight = self.data.reserve(f"{name}.weight", np.uint8, packing.shape)

        def make(first: int, end: int) -> dict[str, np.ndarray]:
            return {weight: packing.panels(tensor, first, end)}

        shape = (packing.num_panels, COLUMNS * width)
        self.data.fill(Content(tensor.name, shape, tensor.num_bytes, make), weight)
        inputs = [rows, weight]
        addend = np.zeros(0) if bias is None else self.checkpoint[bias].rows()
        if addend.any():
            inputs.append(self.data.add(f"{name}.bias", packing.vector(addend)))
        return self.node(
            "QuantizedMatMul",
            inputs,
            output,
            OWN,
            K=width,
            N=num_rows,
            bits=scheme.bits,
            block_size=scheme.block_size,
            epilogue="swiglu" if swiglu else "none",
        )

    def ordered(self, name: str, matrix: Matrix, rows: str) -> str:
        """Rows in the order that a matrix has its weights in."""
        if matrix.order is None:
            return rows
        order = self.data.add(f"{name}.order", matrix.order.astype(np.int32))
        return self.node("Gather", [rows, order], f"{name}.ordered", axis=1)

    def keep(self, name: str, weight: Source, dtype: np.dtype | type) -> None:
        """Fills an initialiser with a weight that is not quantised."""

        def narrowed(first: int, end: int) -> dict[str, np.ndarray]:
            return {name: _narrowed(weight.name, weight.rows(first, end), dtype)}

        self.data.fill(Content.of(weight, narrowed), name)

    def node(self, kind: str, inputs: list[str], output: str, domain: str = "", **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], output, domain=domain, **attributes))
        return output
