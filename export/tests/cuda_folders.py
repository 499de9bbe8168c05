"""Owns the folders that CUDA tests on both sides run: every kind of graph of one tiny checkpoint.

`cuda_folders.py OUT` writes them for the Rust side.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from glm_export.cli import export
from glm_export.dev import tiny
from glm_export.graph import manifest, target
from glm_export.read import config

SCALES = "scales.json"
GRAPHS = {
    "fp16": ("fp16", {}),
    "bf16": ("bf16", {}),
    "int8-fp16": ("int8", {}),
    "int4-fp16": ("int4", {}),
    "fp8-fp16": ("fp8", {}),
    "fp8-bf16": ("fp8", {"activations": "bf16"}),
    "int8-bf16": ("int8", {"activations": "bf16"}),
    "int4-bf16": ("int4", {"activations": "bf16"}),
    "fp16-logits": ("fp16", {"output": "logits"}),
    "fp16-kv-fp8": ("fp16", {"kv_cache_dtype": "float8e4m3fn"}),
    "bf16-kv-fp8": ("bf16", {"kv_cache_dtype": "float8e4m3fn"}),
    "fp16-kv-fp8-given": ("fp16", {"kv_cache_dtype": "float8e4m3fn", "kv_cache_scales": SCALES}),
    "fp16-kv-int8": ("fp16", {"kv_cache_dtype": "int8"}),
    "fp16-kv-int8-given": ("fp16", {"kv_cache_dtype": "int8", "kv_cache_scales": SCALES}),
    "int4-kv-int4": ("int4", {"kv_cache_dtype": "int4", "kv_cache_scales": SCALES}),
    "fp16-kv-int4": ("fp16", {"kv_cache_dtype": "int4"}),
    "fp16-whole-heads": ("fp16", {}),
    "fp16-vocabulary": ("fp16", {}),
}
# Whose heads rotate as a whole.
WHOLE_HEADS = "glm-edge-1.5b-chat"
# With as many rows of logits as ChatGLM3 has.
VOCABULARY = "vocabulary"
CHECKPOINTS = {"fp16-whole-heads": WHOLE_HEADS, "fp16-vocabulary": VOCABULARY}
NEGATIVE_CONTROL = "unique"


def write(out):
    """Writes a folder for each graph, and one with a node that has no CUDA kernel."""
    # Heads as wide as ChatGLM3's, contexts that attention splits: the choice of kernels depends on both.
    shape = tiny.Shape(head_dim=128, seq_length=1024)
    tiny.write(out / "checkpoint", shape)
    tiny.write(out / WHOLE_HEADS, shape, member=WHOLE_HEADS)
    tiny.write(out / VOCABULARY, replace(shape, padded_vocab_size=65024))
    (out / SCALES).write_text(json.dumps({"key": [0.1, 0.1], "value": [0.1, 0.1]}))
    for name, (precision, options) in GRAPHS.items():
        if "kv_cache_scales" in options:
            options = options | {"kv_cache_scales": out / SCALES}
        checkpoint = out / CHECKPOINTS.get(name, "checkpoint")
        export(checkpoint, out / name, precision, provider="cuda", **options)
    _write_negative_control(out)
    return out


def _write_negative_control(out):
    folder = out / NEGATIVE_CONTROL
    export(out / "checkpoint", folder, "fp16", provider="cuda")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node.append(helper.make_node("Unique", ["logits"], ["unique"]))
    model.graph.output.append(helper.make_tensor_value_info("unique", TensorProto.FLOAT, ["n"]))
    onnx.save(model, folder / "model.onnx")
    (folder / "manifest.json").unlink()
    manifest.write(config.load(out / "checkpoint"), target.choose("fp16", "cuda"), folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
