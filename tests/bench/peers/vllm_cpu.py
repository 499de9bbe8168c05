"""Owns vLLM's CPU build as a contender: a third-party package of it, in an environment of its own."""

import shutil
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import ClassVar

import numpy as np
from safetensors import safe_open

from . import w8a8
from .completions import post
from .contender import Contender, Grid, Settings
from .models import Model
from .paths import NUM_THREADS, ROOT, VLLM
from .unavailable import Unavailable

PYTHON = VLLM / "bin" / "python"
INSTALL = ROOT / "tests" / "bench" / "peers" / "install_vllm.sh"
STAMP = VLLM / "stamp"
MIB = 1 << 20


class VllmCpu(Contender):
    """vLLM with int8 weights and activations, its fastest on a CPU."""

    name = "vLLM W8A8"
    kv_dtype = "bfloat16"
    ready_timeout_s = 400
    grid: ClassVar[Grid] = {"--max-num-batched-tokens": (2048, 512)}

    def prepare(self, model: Model) -> None:
        if model.name == "default":
            raise Unavailable("vLLM's ChatGLM code wants heads as wide together as the hidden state")
        if not STAMP.is_file():
            done = subprocess.run(
                [INSTALL, VLLM, sys.executable], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise Unavailable(f"install_vllm.sh: {done.stderr.strip()[-800:]}")
        folder = self._folder(model)
        if not folder.is_dir():
            temporary = folder.with_name("w8a8.new")
            shutil.rmtree(temporary, ignore_errors=True)
            w8a8.write(model, temporary)
            temporary.rename(folder)

    def command(self, model: Model, port: int, settings: Settings) -> list:
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", self._folder(model)]
        command += ["--host", "127.0.0.1", "--port", port, "--dtype", "bfloat16", "--enforce-eager"]
        # A bench of prefix caches is another one.
        command += ["--no-enable-prefix-caching", "--max-num-seqs", 64, "--max-model-len", 2048]
        command += ["--max-logprobs", model.settings.geometry.padded_vocab_size]
        return [*command, *(word for pair in settings.items() for word in pair)]

    def environment(self) -> dict[str, str]:
        return {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{NUM_THREADS - 1}",
            # Its version does not say what it was built for.
            "VLLM_TARGET_DEVICE": "cpu",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # Its packages are its own.
            "PYTHONPATH": "",
        }

    def sources(self, model: Model) -> list[Path]:
        return [self._folder(model) / "config.json", STAMP]

    def bits_per_weight(self, model: Model) -> float:
        num_bits = num_weights = 0
        with safe_open(self._folder(model) / "model.safetensors", "numpy") as file:
            names = list(file.keys())
            for name in names:
                shape, kind = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
                if len(shape) == 2 and "word_embeddings" not in name:
                    is_scale = name.endswith("_scale")
                    # What is not int8 is served as bfloat16.
                    num_bits += prod(shape) * (32 if is_scale else 8 if kind == "I8" else 16)
                    num_weights += 0 if is_scale else prod(shape)
        return num_bits / num_weights

    def logprobs(self, model: Model, ids: list[int], positions: list[int]) -> np.ndarray:
        num_tokens = model.settings.geometry.padded_vocab_size
        rows = np.full((len(positions), num_tokens), -np.inf)
        with self.start(model, self.defaults()) as server:
            server.wait_ready(self.ready_timeout_s)
            for row, position in zip(rows, positions, strict=True):
                body = {"model": str(self._folder(model)), "prompt": ids[: position + 1], "max_tokens": 1}
                body |= {"temperature": 0, "logprobs": num_tokens, "return_tokens_as_token_ids": True}
                choice = post(f"{server.url}/v1/completions", body)["choices"][0]
                for token, logprob in choice["logprobs"]["top_logprobs"][0].items():
                    row[int(token.removeprefix("token_id:"))] = logprob
        return rows

    def _folder(self, model: Model) -> Path:
        return model.folder / "w8a8"
