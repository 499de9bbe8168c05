"""Owns the weights that all contenders share: random ones of a given shape, or the default model's.

Invariant: the same model and seed give the same checkpoint, so figures of two runs may be compared.
"""

import json
import math
import mmap
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from glm_export.dev import tiny
from glm_export.models.family import CHATGLM3_SPECIALS
from glm_export.read import config, weights
from glm_export.read.checkpoint import Checkpoint
from glm_export.read.config import OVERRIDES_FILE

from . import vocabulary
from .paths import BIN, ROOT, WORK

SEED = 7
# tiny.py keeps variances: logits of variance 1 make nearly every token as likely as the next. With this the
# entropy is about that of a language model.
HEAD_SCALE = 4.0
TEXT = ROOT / "export" / "glm_export" / "verify" / "quality.txt"
RANDOM = {
    "m": tiny.Shape(24, 1024, 8, 2, 128, 3072, seq_length=4096, padded_vocab_size=65_024),
    # ChatGLM3-6B's own; making it takes 50 GB of memory.
    "6b": tiny.Shape(28, 4096, 32, 2, 128, 13_696, seq_length=4096, padded_vocab_size=65_024),
}
NAMES = (*RANDOM, "default")


@dataclass(frozen=True)
class Model:
    """A checkpoint in ChatGLM3's layout, and where the contenders' forms of it go."""

    name: str
    folder: Path
    checkpoint: Path
    settings: config.Config

    @property
    def num_head_weights(self) -> int:
        """Weights of the LM head, read once for each row that is sampled."""
        geometry = self.settings.geometry
        return geometry.padded_vocab_size * geometry.hidden_size

    @property
    def num_layer_weights(self) -> int:
        """Weights of all matrices in the layers, read for every token."""
        sizes = [weight.shape for weight in weights.every(self.settings) if len(weight.shape) == 2]
        return sum(rows * columns for rows, columns in sizes) - 2 * self.num_head_weights

    def sample_ids(self, count: int) -> list[int]:
        """A sequence to compare distributions on: real text for a real model."""
        if self.name == "default":
            text = (self.checkpoint / "tokenizer.json").read_text()
            return vocabulary.Tokenizer.from_str(text).encode(TEXT.read_text()).ids[:count]
        first_special = min(self.settings.chat.special_tokens.values())
        return np.random.default_rng(SEED).integers(256, first_special, count).tolist()


def prepare(name: str) -> Model:
    """Makes the checkpoint, if it is not there."""
    folder = WORK / name
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "checkpoint.new"
        shutil.rmtree(temporary, ignore_errors=True)
        if name == "default":
            subprocess.run([BIN / "glm-default-model", temporary], check=True, stdout=subprocess.DEVNULL)
        else:
            write_random(temporary, RANDOM[name])
        temporary.rename(checkpoint)
    return Model(name, folder, checkpoint, config.load(checkpoint))


def write_random(folder: Path, shape: tiny.Shape) -> None:
    """Random weights, under a tokenizer whose tokens are words."""
    tiny.write(folder, shape, SEED)
    overrides_file = folder / OVERRIDES_FILE
    overrides = json.loads(overrides_file.read_text())
    vocab_size = shape.padded_vocab_size
    first = vocab_size - len(CHATGLM3_SPECIALS)
    specials = {text: first + index for index, text in enumerate(CHATGLM3_SPECIALS)}
    overrides["vocab_size"] = vocab_size
    overrides["tokenizer"] = {"file": "tokenizer.json", "pieces": "byte_level"}
    overrides["chat"]["special_tokens"] = specials
    overrides["chat"]["stop_token_ids"] = [specials["<|user|>"], specials["<|observation|>"]]
    overrides_file.write_text(json.dumps(overrides, ensure_ascii=False, indent=2) + "\n")
    vocabulary.tokenizer(first).save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer.model").unlink()
    for name, factor in scales(config.load(folder)).items():
        scale_in_place(folder, name, factor)


def scales(settings: config.Config) -> dict[str, float]:
    """Factors by which a random network errs like a trained one when its weights are rounded.

    Each layer adds its part to what the embedding began, as networks are initialised for training. Without
    that, what the last layers see is noise of the first ones, and so is any error in them.
    """
    top = weights.top_level(settings)
    factors = {
        top["embedding"].source: math.sqrt(settings.geometry.hidden_size),
        top["lm_head"].source: HEAD_SCALE,
    }
    for index in range(settings.geometry.num_layers):
        layer = weights.layer(settings, index)
        for role in ("dense", "down"):
            factors[layer[role].source] = 1 / math.sqrt(2 * settings.geometry.num_layers)
    return factors


def scale_in_place(folder: Path, name: str, factor: float) -> None:
    """Multiplies one float32 tensor where it lies in its file."""
    tensor = Checkpoint(folder)[name]
    with (folder / "model.safetensors").open("r+b") as file, mmap.mmap(file.fileno(), 0) as buffer:
        count = int(np.prod(tensor.shape))
        values = np.frombuffer(buffer, "<f4", count, tensor.offset)
        scaled = (values * np.float32(factor)).tobytes()
        # The view must be gone before the map can be closed.
        del values
        buffer[tensor.offset : tensor.offset + len(scaled)] = scaled
