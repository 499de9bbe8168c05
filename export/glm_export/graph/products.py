"""Owns the nodes that multiply rows by weights: which one a precision and a provider have, and its arrays.

Invariant: the target's provider has a kernel for every node but QuantizedMatMul, which the engine brings.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from glm_export.error import ExportError
from glm_export.graph.external_data import Content
from glm_export.graph.fusion import MICROSOFT, OWN
from glm_export.graph.nodes import Nodes, narrowed
from glm_export.graph.packing import BLOCK_SIZES, COLUMNS, Packing
from glm_export.graph.target import Target
from glm_export.quantise.fp8 import Fp8Scheme
from glm_export.quantise.quantize import Scheme
from glm_export.read.checkpoint import Rows, Source
from glm_export.read.prequantised import Matrix

# Activations become int8 inside the kernel: at 8 bits any other level dequantises the weights at each call.
INT8_ACTIVATIONS = 4


AnyScheme = Scheme | Fp8Scheme


class Products:
    """Adds products to a graph; without a scheme the weights have the activations' type."""

    def __init__(
        self,
        nodes: Nodes,
        checkpoint: Mapping[str, Source],
        scheme: Scheme | Fp8Scheme | None,
        target: Target,
    ) -> None:
        self.nodes = nodes
        self.checkpoint = checkpoint
        self.scheme = scheme
        self.target = target
        self.dtype = target.dtype

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
            self.nodes.add_many("Split", [gate_up], [gate, up], f"{prefix}split", axis=1, num_outputs=2)
        # QuickGelu is x * sigmoid(alpha * x): SiLU at alpha 1, in one kernel.
        silu = self.nodes.add("QuickGelu", [gate], f"{prefix}silu", MICROSOFT, alpha=1.0)
        return self.nodes.add("Mul", [silu, up], f"{prefix}product")

    def linear(self, name: str, source: str, bias: str | None, rows: str, output: str | None = None) -> str:
        """rows @ weight.T + bias."""
        if self.is_packed(source):
            return self.packed(name, source, bias, rows, output or name)
        addend = np.zeros(0) if bias is None else self.checkpoint[bias].rows()
        bias_name = ""
        if addend.any():
            bias_name = self.nodes.data.add(f"{name}.bias", narrowed(bias, addend, self.dtype))
        return self.product(name, self.checkpoint[source], bias_name, rows, output or name)

    def product(self, name: str, tensor: Source, bias_name: str, rows: str, output: str) -> str:
        """rows @ tensor.T + bias by a node of ONNX Runtime."""
        if self.scheme is None:
            weight = self.nodes.keep(f"{name}.weight", tensor, self.dtype)
            inputs = [rows, weight, *([bias_name] if bias_name else [])]
            return self.nodes.add("Gemm", inputs, output, transB=1)

        if isinstance(self.scheme, Fp8Scheme):
            return self.fp8(name, self.scheme, tensor, bias_name, rows, output)
        return self.integers(name, self.scheme, tensor, bias_name, rows, output)

    def fp8(
        self, name: str, scheme: Fp8Scheme, tensor: Source, bias_name: str, rows: str, output: str
    ) -> str:
        """rows @ tensor.T + bias with weights of 8-bit floats."""
        if isinstance(tensor, Matrix):
            raise ExportError(
                f"{tensor.name} is quantised to {tensor.scheme.bits} bits already: "
                f"choose --precision int{tensor.scheme.bits}"
            )
        dtypes = scheme.dtypes()
        arrays = {
            part: self.nodes.data.reserve(f"{name}.{part}", dtypes[part], shape)
            for part, shape in scheme.shapes(*tensor.shape).items()
        }

        def quantised(first: int, end: int) -> dict[str, np.ndarray]:
            return {arrays[part]: array for part, array in scheme.quantize(tensor.rows(first, end)).items()}

        self.nodes.data.fill(Content.of(tensor, quantised), *arrays.values())
        # Without a scale of its own, what enters stays in half precision.
        inputs = [rows, arrays["codes"], arrays["block_scales"], *(["", bias_name] if bias_name else [])]
        kind = "MatMulBlockQuantizedFp8Weight"
        return self.nodes.add(kind, inputs, output, MICROSOFT, block_size=scheme.block_size)

    def integers(
        self, name: str, chosen: Scheme, tensor: Source, bias_name: str, rows: str, output: str
    ) -> str:
        """rows @ tensor.T + bias with weights of 8 or 4 bits."""
        num_rows, width = tensor.shape
        is_taken = isinstance(tensor, Matrix)
        scheme = tensor.scheme if is_taken else chosen.fitted(tensor.name, width)
        if is_taken and chosen.bits != scheme.bits:
            raise ExportError(
                f"{tensor.name} is quantised to {scheme.bits} bits already: "
                f"choose --precision int{scheme.bits}"
            )
        arrays = {
            part: self.nodes.data.reserve(
                f"{name}.{part}", self.dtype if part == "scales" else np.uint8, shape
            )
            for part, shape in scheme.shapes(num_rows, width).items()
        }

        def quantised(first: int, end: int) -> dict[str, np.ndarray]:
            parts = tensor.arrays(first, end) if is_taken else scheme.quantize(tensor.rows(first, end))
            parts["scales"] = parts["scales"].astype(self.dtype)
            return {arrays[part]: array for part, array in parts.items()}

        self.nodes.data.fill(Content.of(tensor, quantised), *arrays.values())
        if is_taken:
            rows = self.ordered(name, tensor, rows)
        inputs = [rows, arrays["packed"], arrays["scales"], arrays.get("zeros", ""), "", bias_name]
        while not inputs[-1]:
            inputs.pop()
        return self.nodes.add(
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
        weight = self.nodes.data.reserve(f"{name}.weight", np.uint8, packing.shape)

        def make(first: int, end: int) -> dict[str, np.ndarray]:
            return {weight: packing.panels(tensor, first, end)}

        shape = (packing.num_panels, COLUMNS * width)
        self.nodes.data.fill(Content(tensor.name, shape, tensor.num_bytes, make), weight)
        inputs = [rows, weight]
        addend = np.zeros(0) if bias is None else self.checkpoint[bias].rows()
        if addend.any():
            inputs.append(self.nodes.data.add(f"{name}.bias", packing.vector(addend)))
        return self.nodes.add(
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
        order = self.nodes.data.add(f"{name}.order", matrix.order.astype(np.int32))
        return self.nodes.add("Gather", [rows, order], f"{name}.ordered", axis=1)
