"""Owns LoRA adapters in PEFT's files: added to the weights they were trained for, a few rows at a time.

Invariant: every tensor of the adapter is used, and nothing of its config that changes the sum is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm_export.error import ExportError
from glm_export.read import prequantised
from glm_export.read.checkpoint import Source, Tensor, read_file
from glm_export.read.json_file import read_object

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# How PEFT wraps the name of a module.
PREFIX = "base_model.model."
# What would make the sum another one, with the values that do not.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    # Others change the weights that the adapter is added to.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Merged:
    """A weight and the product that an adapter adds to it."""

    base: Source
    # [N, r] and, scaled, [r, K].
    up: np.ndarray
    down: np.ndarray

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.base.shape

    @property
    def num_bytes(self) -> int:
        """As `Tensor.num_bytes`."""
        return self.base.num_bytes

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As `Tensor.rows`. In float64, so that the sum is rounded once."""
        return (self.base.rows(start, stop) + self.up[start:stop] @ self.down).astype(np.float32)


def merged(tensors: Mapping[str, Source], folder: Path) -> Mapping[str, Source]:
    """The tensors with an adapter added."""
    settings = _settings(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _weights(folder).items():
        module, found, side = name.removeprefix(PREFIX).rpartition(".lora_")
        if not found or side not in ("A.weight", "B.weight"):
            raise ExportError(f"{folder}: {name} is not the A or B of a linear layer; that is not supported")
        pairs.setdefault(module, {})[side[0]] = tensor
    if not pairs:
        raise ExportError(f"{folder}: the adapter has no weights")
    return dict(tensors) | {
        f"{module}.weight": _merge(folder, module, pair, settings, tensors) for module, pair in pairs.items()
    }


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file() and (folder / "config.json").is_file():
        raise ExportError(
            f"{path} is missing: --lora takes PEFT's folder, not a checkpoint or a P-Tuning prefix"
        )
    settings = read_object(path)
    for key, values in PLAIN.items():
        found = settings.get(key, values[0])
        if found not in values:
            raise ExportError(f"{path}: {key} is {found!r}, which is not supported; expected {values[0]!r}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    for key, value in (("r", rank), ("lora_alpha", alpha)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ExportError(f"{path}: {key} is {value!r}, expected a positive number")
    return settings


def _weights(folder: Path) -> dict[str, Tensor]:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read_file(folder / name)
    raise ExportError(f"{folder} has no adapter weights: expected {' or '.join(WEIGHT_FILES)}")


def _merge(
    folder: Path,
    module: str,
    pair: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    tensors: Mapping[str, Source],
) -> Merged:
    base = tensors.get(f"{module}.weight")
    if base is None:
        raise ExportError(f"{folder}: the checkpoint has no {module}.weight for the adapter to change")
    if isinstance(base, prequantised.Matrix):
        raise ExportError(f"{base.name} is quantised already: an adapter can be merged before that only")
    rank = settings["r"]
    shapes = {"A": (rank, base.shape[-1]), "B": (base.shape[0], rank)}
    for side, shape in shapes.items():
        if side not in pair:
            raise ExportError(f"{folder}: {module}.lora_{side}.weight is missing")
        if pair[side].shape != shape:
            raise ExportError(
                f"{folder}: {pair[side].name} has shape {list(pair[side].shape)}, expected {list(shape)}"
            )
    # `fan_in_fan_out` is for layers that store [in, out]; PEFT itself turns it off for linear ones, and the
    # family has no others.
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    up, down = (pair[side].rows().astype(np.float64) for side in "BA")
    return Merged(base, up, down * scale)
