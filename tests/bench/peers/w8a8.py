"""Owns the compressed-tensors form of a checkpoint: int8 weights with a scale a row, for vLLM.

Activations are quantised by the server, each token with a scale of its own; the LM head stays as it was, as
vLLM's tools leave it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from glm_export import checkpoint_writer
from glm_export.read import weights
from glm_export.read.checkpoint import Checkpoint

from .gguf_file import CHAT_TEMPLATE
from .models import Model

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["transformer.output_layer"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


def write(model: Model, folder: Path) -> None:
    """Writes the folder that vLLM serves."""
    folder.mkdir(parents=True)
    config = json.loads((model.checkpoint / "config.json").read_text())
    stops = model.settings.chat.stop_token_ids
    config |= {"quantization_config": QUANTIZATION, "eos_token_id": stops[0], "pad_token_id": stops[0]}
    # ChatGLM3 rotates neighbours, not halves; vLLM asks for a word on it.
    config["original_rope"] = True
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copyfile(model.checkpoint / "tokenizer.json", folder / "tokenizer.json")
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    checkpoint, whole = Checkpoint(model.checkpoint), weights.top_level(model.settings)
    tensors = {weight.source: checkpoint[weight.source].rows() for weight in whole.values()}
    for weight in weights.every(model.settings):
        if weight.source not in tensors:
            tensors |= quantize(weight.source, checkpoint[weight.source].rows())
    checkpoint_writer.write_weights(folder, tensors)


def quantize(name: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """A matrix as int8 with its scales; anything else as it is."""
    if rows.ndim != 2:
        return {name: rows}
    scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)
    return {name: np.rint(rows / scales).astype(np.int8), f"{name}_scale": scales.astype(np.float32)}
