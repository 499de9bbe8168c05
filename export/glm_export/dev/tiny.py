"""Owns the tiny random checkpoints that tests on both sides export and run: any member, small numbers.

Invariant: the same arguments give the same files, so a test may compare across runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm_export import checkpoint_writer
from glm_export.dev import tiny_tokenizer
from glm_export.error import ExportError
from glm_export.models import family
from glm_export.output_folder import output_folder
from glm_export.read import config, weights
from glm_export.read.config import OVERRIDES_FILE

NAME = "tiny-random"
NUM_PIECES = tiny_tokenizer.NUM_PIECES
DEFAULT_MEMBER = "chatglm3-6b"
# What a member's config.json says besides its sizes. Ratios are smaller than the real ones where positions of
# a short test would hardly turn.
MEMBERS: dict[str, dict[str, Any]] = {
    **{name: {} for name in family.MEMBERS},
    "chatglm3-6b-32k": {"rope_ratio": 50},
    "chatglm3-6b-128k": {"rope_ratio": 500},
    "chatglm2-6b-32k": {"rope_ratio": 16},
    "glm-4-9b-chat": {"rope_ratio": 500, "layernorm_epsilon": 1.5625e-07},
    "glm-4-9b-chat-1m": {"rope_ratio": 10_000, "layernorm_epsilon": 1.5625e-07, "multi_query_group_num": 4},
    "glm-4-9b": {"layernorm_epsilon": 1.5625e-07},
    "glm-edge-1.5b-chat": {"partial_rotary_factor": 1.0, "attention_bias": False},
    "glm-edge-4b-chat": {"partial_rotary_factor": 1.0, "attention_bias": False, "tie_word_embeddings": True},
    "glm-4-9b-chat-hf": {"attention_bias": True, "rope_theta": 5_000_000.0, "rms_norm_eps": 1.5625e-07},
    "glm-4-9b-hf": {"attention_bias": True, "rms_norm_eps": 1.5625e-07},
}
# The part of the templates by which they are recognised.
TEMPLATES = {
    "glm-edge-1.5b-chat": "<|user|>\n{{ message }}<|assistant|>",
    "glm-edge-4b-chat": "<|user|>\n{{ message }}<|assistant|>",
    "glm-4-9b-chat-hf": "[gMASK]<sop><|user|>\n{{ message }}<|assistant|>",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; the defaults are the smallest that exercise groups, blocks and two layers."""

    num_layers: int = 2
    hidden_size: int = 64
    num_attention_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    ffn_size: int = 128
    seq_length: int = 512
    rope_ratio: float = 1.0
    # At least the tokenizer's, which is small: more rows make a head of the real size.
    padded_vocab_size: int = 0

    def sizes(self, keys: Mapping[str, str], vocab_size: int) -> dict[str, Any]:
        """The part of config.json that is of this shape, under a layout's keys."""
        ours = vars(self) | {
            "max_model_len": self.seq_length,
            # Rows beyond the vocabulary, as the real ones have: a server must never sample them.
            "padded_vocab_size": max(-(-(vocab_size + 1) // 64) * 64, self.padded_vocab_size),
            "norm_epsilon": 1e-5,
        }
        return {key: ours[name] for name, key in keys.items()}


def write(
    out: Path,
    shape: Shape | None = None,
    seed: int = 0,
    force: bool = False,
    member: str = DEFAULT_MEMBER,
) -> None:
    """Writes the checkpoint folder."""
    shape = shape or Shape()
    if member not in MEMBERS:
        raise ExportError(f"--member {member!r} is not one of {', '.join(MEMBERS)}")
    about = {"name": NAME, "license": "Apache-2.0", "origin": f"random weights, seed {seed}"}
    with output_folder(out, force, OVERRIDES_FILE) as folder:
        is_native = member not in family.MEMBERS
        (_write_native if is_native else write_chatglm)(folder, shape, member, about)
        # Names and shapes of the weights follow from the config just written.
        settings = config.load(folder)
        tensors = _random_weights(settings, np.random.default_rng(seed))
        if is_native:
            tensors = _split(settings, tensors)
        checkpoint_writer.write_weights(folder, tensors)


def write_chatglm(folder: Path, shape: Shape, member: str, about: dict[str, Any]) -> None:
    """Writes all but the weights of a member in ChatGLM's layout."""
    real = family.MEMBERS[member]
    is_tiktoken = real.tokenizer == family.TIKTOKEN
    pieces = tiny_tokenizer.train_tiktoken() if is_tiktoken else tiny_tokenizer.train_sentencepiece()
    (folder / real.tokenizer.file).write_bytes(pieces)
    specials = family.numbered(tuple(real.special_tokens), NUM_PIECES)
    vocab_size = NUM_PIECES + len(specials)
    chat = {
        "format": real.format,
        "special_tokens": specials,
        "stop_token_ids": list(family.stops(specials, real.format)),
    }
    sizes = shape.sizes(config.CHATGLM_KEYS, vocab_size) | {"rope_ratio": shape.rope_ratio} | MEMBERS[member]
    overrides = about | {"member": member, "vocab_size": vocab_size, "chat": chat}
    checkpoint_writer.write_config(folder, sizes, overrides)


def _write_native(folder: Path, shape: Shape, member: str, about: dict[str, Any]) -> None:
    specials = family.numbered(family.GLM4_SPECIALS, NUM_PIECES)
    tiny_tokenizer.write_json(tiny_tokenizer.train_tiktoken(), specials, folder)
    ends = [specials[text] for text in ("<|endoftext|>", *family.NEXT_TURN)]
    content = {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "hidden_act": "silu",
        "eos_token_id": ends,
        "pad_token_id": ends[0],
        **shape.sizes(config.GLM_KEYS, NUM_PIECES + len(specials)),
        "rope_theta": config.ROPE_BASE * shape.rope_ratio,
        **MEMBERS[member],
    }
    checkpoint_writer.write_json(folder / "config.json", content)
    template = {"chat_template": TEMPLATES[member]} if member in TEMPLATES else {}
    checkpoint_writer.write_json(folder / "tokenizer_config.json", template)
    (folder / OVERRIDES_FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")


def _split(settings: config.Config, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights under transformers' names."""
    found: dict[str, np.ndarray] = {}
    for weight in weights.every(settings):
        counts = [shape[0] for shape in weight.parts.values()]
        parts = np.split(tensors[weight.source], np.cumsum(counts)[:-1])
        found |= dict(zip(weight.reference, parts, strict=True))
    if settings.is_tied:
        del found[weights.HEAD]
    return found


def _random_weights(settings: config.Config, generator: np.random.Generator) -> dict[str, np.ndarray]:
    tensors = {}
    for weight in weights.every(settings):
        noise = generator.standard_normal(weight.shape, dtype=np.float32)
        if len(weight.shape) == 1:
            # Norms scale by about 1, biases add about 0; both are visible in the result.
            tensors[weight.source] = noise * np.float32(0.1) + np.float32("norm" in weight.source)
        else:
            # Keeps the variance of what passes through, so that no layer drowns the others.
            tensors[weight.source] = noise / np.float32(np.sqrt(weight.shape[1]))
    return tensors


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m glm_export.dev.tiny`."""
    parser = argparse.ArgumentParser(
        prog="glm_export.dev.tiny", description="Write a tiny random checkpoint folder."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--member", choices=MEMBERS, default=DEFAULT_MEMBER, help="whose layout (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    defaults = Shape()
    for size, default in vars(defaults).items():
        parser.add_argument(f"--{size.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    shape = Shape(**{size: getattr(options, size) for size in vars(defaults)})
    try:
        write(options.out, shape, options.seed, options.force, options.member)
    except (ExportError, OSError) as error:
        print(f"glm_export.tiny: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {NAME}, {options.member}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
