"""Owns what a graph is made for: provider, precision, types of activations and cache, block size, output,
kernel.

Invariant: a Target that exists can be run by its provider; what cannot was refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from glm_export.error import ExportError
from glm_export.read.config import Geometry
from glm_export.read.json_file import read_object

# Bits of a quantised weight; None leaves weights in the activations' type.
PRECISIONS = {"fp32": None, "fp16": None, "bf16": None, "fp8": 8, "int8": 8, "int4": 4}
PROVIDERS = ("cpu", "cuda")
OUTPUTS = ("logits", "topk")
# What multiplies by quantised weights: the engine's own operator, or ONNX Runtime's MatMulNBits.
KERNELS = ("glmserve", "ort")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# What an element is stored as; two of int4 share a byte.
KV_CACHES = DTYPES | {"float8e4m3fn": ml_dtypes.float8_e4m3fn, "int8": np.int8, "int4": np.uint8}
QUANTISED_KV_CACHES = ("float8e4m3fn", "int8", "int4")
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# ONNX Runtime's flash kernels read pages of 128 tokens in place at ChatGLM3's head of 128 channels, and
# smaller ones only after a copy.
BLOCK_SIZES = {"cpu": 32, "cuda": 128}


@dataclass(frozen=True)
class Target:
    """One choice of all that the checkpoint leaves open; dtypes are the manifest's names."""

    precision: str
    provider: str = "cpu"
    activations: str = "float32"
    kv_cache: str = "float32"
    block_size: int = BLOCK_SIZES["cpu"]
    output: str = "logits"
    kernel: str = "ort"
    # One factor a layer for keys and one for values, if they were given.
    key_scales: tuple[float, ...] = ()
    value_scales: tuple[float, ...] = ()

    @property
    def has_quantised_cache(self) -> bool:
        """Whether keys and values are divided by a scale when they are stored."""
        return self.kv_cache in QUANTISED_KV_CACHES

    @property
    def dtype(self) -> np.dtype:
        """Type of activations, and of weights that are not quantised."""
        return np.dtype(DTYPES[self.activations])


def choose(
    precision: str,
    provider: str = "cpu",
    *,
    activations: str | None = None,
    kv_cache: str | None = None,
    block_size: int | None = None,
    output: str | None = None,
    kernel: str | None = None,
) -> Target:
    """Fills in what was not chosen, and refuses what the provider cannot run."""
    block_size = BLOCK_SIZES[provider] if block_size is None else block_size
    if not 16 <= block_size <= 256 or block_size & (block_size - 1):
        raise ExportError(f"--block-size {block_size} is not a power of two from 16 to 256")
    if precision == "fp8" and provider != "cuda":
        raise ExportError(
            "--precision fp8 is for --provider cuda: on the CPU int8 takes as much memory and is more exact"
        )
    if PRECISIONS[precision] is None:
        if activations not in (None, precision):
            raise ExportError(
                f"--activations {activations}: weights of {precision} have activations of {precision}"
            )
        activations = precision
    activations = SHORT[activations or ("fp32" if provider == "cpu" else "fp16")]
    # The CPU's fp16 would only be converted; CUDA's PagedAttention has no float32.
    if (provider == "cpu") != (activations == "float32"):
        _refuse_activations(provider, activations)
    if kv_cache is None:
        # Rounding it costs far less than rounding the weights did (README), and halves what a decode reads.
        is_rounded = provider == "cpu" and PRECISIONS[precision] is not None
        kv_cache = "bfloat16" if is_rounded else activations
    if kv_cache != activations:
        _refuse_kv_cache(provider, kv_cache, activations)
    output = output or ("logits" if provider == "cpu" else "topk")
    can_choose = provider == "cpu" and PRECISIONS[precision] is not None
    if kernel == "glmserve" and not can_choose:
        raise ExportError("--kernel glmserve multiplies by weights of int8 or int4 on the CPU, and no others")
    kernel = kernel or ("glmserve" if can_choose else "ort")
    return Target(precision, provider, activations, kv_cache, block_size, output, kernel)


def check_geometry(target: Target, geometry: Geometry) -> None:
    """Refuses sizes that the provider's attention has no kernel for."""
    width = geometry.rotary_dim // 2
    if target.provider == "cuda" and width % 8:
        raise ExportError(
            f"--provider cuda: PagedAttention rotates multiples of 16 channels, not {geometry.rotary_dim} of "
            f"{geometry.head_dim}"
        )


def _refuse_activations(provider: str, activations: str) -> None:
    if provider == "cpu":
        raise ExportError(
            f"--provider cpu computes in float32: its kernels convert {activations} at each call; "
            "choose --precision fp32, int8 or int4"
        )
    raise ExportError(
        "--provider cuda has no PagedAttention for float32: choose --precision fp16, bf16, fp8, int8 or int4"
    )


def _refuse_kv_cache(provider: str, kv_cache: str, activations: str) -> None:
    others = {"cpu": ("bfloat16",), "cuda": QUANTISED_KV_CACHES}[provider]
    if kv_cache not in others:
        known = f", or one of {', '.join(others)}"
        raise ExportError(
            f"--kv-cache-dtype {kv_cache}: on {provider} it is the activations' {activations}{known}"
        )


def with_scales(target: Target, path: Path | None, num_layers: int) -> Target:
    """The target with the scales of its cache that a file gives; without a file they are measured later."""
    if path is None:
        return target
    if not target.has_quantised_cache:
        raise ExportError(f"--kv-cache-scales: a cache of {target.kv_cache} has no scales")
    keys, values = (_scales(path, role, num_layers) for role in ("key", "value"))
    return replace(target, key_scales=keys, value_scales=values)


def _scales(path: Path, role: str, num_layers: int) -> tuple[float, ...]:
    scales = read_object(path).get(role)
    if (
        not isinstance(scales, list)
        or len(scales) != num_layers
        or not all(isinstance(scale, int | float) and 0 < scale < math.inf for scale in scales)
    ):
        raise ExportError(f"{path}: {role} must be {num_layers} positive numbers, one a layer")
    return tuple(map(float, scales))
