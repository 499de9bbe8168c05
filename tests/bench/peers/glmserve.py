"""Owns glmserve as a contender: each precision that the exporter offers is one."""

import json
import os
import subprocess
import tempfile
from functools import cache
from math import prod
from pathlib import Path
from typing import ClassVar

import glm_export
import numpy as np
import onnx
import onnxruntime
from glm_export.graph import fusion

from .contender import Contender, Grid, Settings
from .models import Model
from .paths import BIN, GLMSERVE, NUM_THREADS

LIBRARY = "GLMSERVE_ORT_LIB"
# Off on all sides: a bench of caches and draft tokens is another one. Only what this build knows is passed.
OFF = (("--no-prefix-cache",), ("--speculative-tokens", "0"))
EXPORTER = Path(glm_export.__file__).parent


class Glmserve(Contender):
    """glmserve with one precision of weights."""

    ready_path = "/readyz"
    grid: ClassVar[Grid] = {"--max-num-batched-tokens": (512, 256, 1024)}

    def __init__(self, precision: str, block: int | None = None, kernel: str | None = None) -> None:
        self.precision = precision
        self.name = f"glmserve {precision}"
        self._options = ["--precision", precision]
        if block:
            self.name += f" b{block}"
            self._options += ["--quant-block-size", str(block)]
        if kernel:
            self.name += f" {kernel}"
            self._options += ["--kernel", kernel]
        self.kv_dtype = "as exported"

    def prepare(self, model: Model) -> None:
        manifest = self.folder(model) / "manifest.json"
        newest = max(path.stat().st_mtime for path in EXPORTER.rglob("*.py"))
        if not manifest.is_file() or manifest.stat().st_mtime < newest:
            command = [BIN / "glm-export", model.checkpoint, self.folder(model), "--force"]
            subprocess.run([*command, *self._options], check=True, stdout=subprocess.DEVNULL)
        self.kv_dtype = json.loads(manifest.read_text())["graph"]["kv_cache_dtype"]

    def command(self, model: Model, port: int, settings: Settings) -> list:
        known = _serve_help()
        off = [word for option in OFF if option[0] in known for word in option]
        limits = ["--max-num-seqs", 64, "--max-num-waiting", 256, "--queue-timeout", 0]
        command = [GLMSERVE, "serve", "--model", self.folder(model), "--port", port, *limits, *off]
        return [*command, "--threads", NUM_THREADS, *(word for pair in settings.items() for word in pair)]

    def sources(self, model: Model) -> list[Path]:
        return [self.folder(model) / "manifest.json", GLMSERVE]

    def environment(self) -> dict[str, str]:
        return _with_library()

    def bits_per_weight(self, model: Model) -> float:
        graph = onnx.load(self.folder(model) / "model.onnx", load_external_data=False).graph
        num_bytes = {
            tensor.name: prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            for tensor in graph.initializer
        }
        products = [node for node in fusion.expanded(graph.node) if "MatMul" in node.op_type]
        num_weight_bytes = sum(num_bytes.get(name, 0) for node in products for name in node.input)
        return 8 * num_weight_bytes / (model.num_layer_weights + model.num_head_weights)

    def logprobs(self, model: Model, ids: list[int], positions: list[int]) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "logits.npy"
            command = [GLMSERVE, "logits", "--model", self.folder(model), "--out", out]
            command += ["--ids", ",".join(map(str, ids))]
            subprocess.run(command, check=True, env=os.environ | _with_library())
            logits = np.load(out)[positions].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def folder(self, model: Model) -> Path:
        """What the exporter writes."""
        return model.folder / self.name.replace(" ", "-")


def _with_library() -> dict[str, str]:
    if LIBRARY in os.environ:
        return {}
    return {LIBRARY: str(next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")))}


@cache
def _serve_help() -> str:
    return subprocess.run([GLMSERVE, "serve", "--help"], check=True, capture_output=True, text=True).stdout
