"""Owns a checkpoint of ChatGLM3-6B's full size with random weights, in the files that the real one comes in.

Invariant: the same seed gives the same weights, in either format; memory does not grow with the size.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

from glm_export.dev import shards, tiny
from glm_export.error import ExportError
from glm_export.output_folder import output_folder, require_space
from glm_export.read import config, weights
from glm_export.read.config import OVERRIDES_FILE

NUM_SHARDS = 7
NAME = "chatglm3-6b-random"
SHAPE = tiny.Shape(
    num_layers=28,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_heads=2,
    head_dim=128,
    ffn_size=13_696,
    seq_length=8192,
    padded_vocab_size=65_024,
)
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"
# Elements that are drawn at once.
CHUNK = 1 << 18


def write(
    out: Path,
    file_format: str = "safetensors",
    shape: tiny.Shape = SHAPE,
    seed: int = 0,
    force: bool = False,
) -> None:
    """Writes the checkpoint folder."""
    about = {"name": NAME, "license": "Apache-2.0", "origin": f"random weights, seed {seed}"}
    with output_folder(out, force, OVERRIDES_FILE) as folder:
        tiny.write_chatglm(folder, shape, tiny.DEFAULT_MEMBER, about)
        settings = config.load(folder)
        # The real files have it too, and nobody needs it.
        shapes = weights.shapes(settings) | {INV_FREQ: (settings.geometry.rotary_dim // 2,)}
        require_space(folder, sum(map(math.prod, shapes.values())) * shards.ITEM_BYTES)
        seeds = {name: [seed, index] for index, name in enumerate(shapes)}

        def chunks(name: str) -> Iterator[np.ndarray]:
            return _random_rows(name, shapes[name], np.random.default_rng(seeds[name]))

        shards.write(folder, shapes, chunks, file_format, NUM_SHARDS)


def _random_rows(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> Iterator[np.ndarray]:
    """As tiny's: what passes through keeps its variance, norms are about 1, biases about 0."""
    scale = 0.1 if len(shape) == 1 else shape[1] ** -0.5
    table = (_normal_quantiles() * scale + ("norm" in name)).astype(np.float16)
    step = max(1, CHUNK // math.prod(shape[1:]))
    for first in range(0, shape[0], step):
        size = (min(step, shape[0] - first), *shape[1:])
        yield table.take(generator.integers(0, len(table), size, dtype=np.uint16))


@cache
def _normal_quantiles() -> np.ndarray:
    """A value for every 16 random bits: drawing from these is many times faster than drawing each anew."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((index + 0.5) / (1 << 16)) for index in range(1 << 16)])


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m glm_export.dev.full_size`."""
    parser = argparse.ArgumentParser(
        prog="glm_export.dev.full_size",
        description="Write a random checkpoint of ChatGLM3-6B's size (12.5 GB).",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--format", choices=shards.FORMATS, default="safetensors", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    options = parser.parse_args(arguments)
    try:
        write(options.out, options.format, seed=options.seed, force=options.force)
    except (ExportError, OSError) as error:
        print(f"glm_export.full_size: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
