"""Owns writing a checkpoint folder in ChatGLM3's layout, for networks that do not come in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from glm_export.read.config import OVERRIDES_FILE

# What every member of the family says, beside its sizes.
FAMILY_CONFIG = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "tie_word_embeddings": False,
}


def write_config(folder: Path, sizes: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Writes config.json, and beside it what the exporter cannot know from the family."""
    write_json(folder / "config.json", FAMILY_CONFIG | dict(sizes))
    write_json(folder / OVERRIDES_FILE, overrides)


def write_weights(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes all tensors into one file."""
    path = folder / "model.safetensors"
    save_file(dict(tensors), path, metadata={"format": "np"})
    # The library makes it private to the user, unlike every other file here.
    path.chmod(0o644)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
