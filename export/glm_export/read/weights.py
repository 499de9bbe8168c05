"""Owns the one table of weight names: ours, the two layouts' that checkpoints come in, and the shapes.

Invariant: beyond this file every weight has its name and shape in ChatGLM's layout. Where transformers' has
the rows of queries, keys and values apart, they are read one after another, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm_export.error import ExportError
from glm_export.read import lora, prequantised
from glm_export.read.checkpoint import Checkpoint, Source, require
from glm_export.read.config import Config

# Recomputed from the config, so that a half-precision copy in the file does no harm.
IGNORED = frozenset({"transformer.rotary_pos_emb.inv_freq", "model.rotary_emb.inv_freq"})
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Weight:
    """One weight of the network: its name and shape in ChatGLM's layout, and transformers' names.

    `reference` has several names, each with its share of the rows, where transformers splits them.
    """

    source: str
    shape: tuple[int, ...]
    reference: tuple[str, ...]
    split: tuple[int, ...] = ()

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Transformers' names with their shapes."""
        rows = self.split or self.shape[:1]
        return {name: (count, *self.shape[1:]) for name, count in zip(self.reference, rows, strict=True)}


@dataclass(frozen=True)
class Stacked:
    """The rows of several tensors as one tensor."""

    name: str
    parts: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """All rows, of one width."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def num_bytes(self) -> int:
        """As `Tensor.num_bytes`."""
        return sum(part.num_bytes for part in self.parts)

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As `Tensor.rows`."""
        stop = self.shape[0] if stop is None else stop
        found, first = [], 0
        for part in self.parts:
            begin, end = max(start - first, 0), min(stop - first, part.shape[0])
            if begin < end:
                found.append(part.rows(begin, end))
            first += part.shape[0]
        return np.concatenate(found)


def open_checkpoint(config: Config, folder: Path, adapter: Path | None = None) -> Mapping[str, Source]:
    """The weights of a folder by their names in ChatGLM's layout, once it is found to have exactly those.

    An adapter is a LoRA folder that is added to them.
    """
    wanted = {name for weight in every(config) for name in (weight.source, *weight.reference)}
    checkpoint = prequantised.opened(Checkpoint(folder), folder, wanted)
    if adapter is not None:
        checkpoint = lora.merged(checkpoint, adapter)
    if not config.is_native:
        require(checkpoint, shapes(config), IGNORED)
        return checkpoint
    parts = {name: shape for weight in every(config) for name, shape in weight.parts.items()}
    if config.is_tied:
        # A file that has the copy as well is no other network.
        parts.pop(HEAD)
        require(checkpoint, parts, IGNORED | {HEAD})
    else:
        require(checkpoint, parts, IGNORED)

    def stored(name: str) -> Source:
        return checkpoint["model.embed_tokens.weight" if config.is_tied and name == HEAD else name]

    opened: dict[str, Source] = {}
    for weight in every(config):
        found = tuple(map(stored, weight.reference))
        if len(found) > 1 and any(isinstance(part, prequantised.Matrix) for part in found):
            raise ExportError(f"{found[0].name} is quantised: that is supported in ChatGLM's own layout only")
        opened[weight.source] = found[0] if len(found) == 1 else Stacked(weight.source, found)
    return opened


def top_level(config: Config) -> dict[str, Weight]:
    """Weights outside the layers, by role."""
    g = config.geometry
    vocab = (g.padded_vocab_size, g.hidden_size)
    return {
        "embedding": Weight(
            "transformer.embedding.word_embeddings.weight", vocab, ("model.embed_tokens.weight",)
        ),
        "final_norm": Weight(
            "transformer.encoder.final_layernorm.weight", (g.hidden_size,), ("model.norm.weight",)
        ),
        "lm_head": Weight("transformer.output_layer.weight", vocab, (HEAD,)),
    }


def layer(config: Config, index: int) -> dict[str, Weight]:
    """Weights of one decoder layer, by role."""
    g, ffn = config.geometry, config.ffn_size
    ours, theirs = f"transformer.encoder.layers.{index}.", f"model.layers.{index}."
    table = {
        "input_norm": ("input_layernorm.weight", (g.hidden_size,), ("input_layernorm.weight",)),
        "qkv": (
            "self_attention.query_key_value.weight",
            (g.qkv_size, g.hidden_size),
            tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
        ),
        "dense": (
            "self_attention.dense.weight",
            (g.hidden_size, g.query_size),
            ("self_attn.o_proj.weight",),
        ),
        "post_norm": (
            "post_attention_layernorm.weight",
            (g.hidden_size,),
            ("post_attention_layernorm.weight",),
        ),
        # The gate's rows come first, then those of up; transformers keeps that order.
        "gate_up": ("mlp.dense_h_to_4h.weight", (2 * ffn, g.hidden_size), ("mlp.gate_up_proj.weight",)),
        "down": ("mlp.dense_4h_to_h.weight", (g.hidden_size, ffn), ("mlp.down_proj.weight",)),
    }
    if config.qkv_bias:
        table["qkv_bias"] = (
            "self_attention.query_key_value.bias",
            (g.qkv_size,),
            tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
        )
    split = (g.query_size, *[g.num_kv_heads * g.head_dim] * 2)
    return {
        role: Weight(
            ours + source,
            shape,
            tuple(theirs + name for name in reference),
            split if len(reference) == len(split) else (),
        )
        for role, (source, shape, reference) in table.items()
    }


def every(config: Config) -> list[Weight]:
    """All weights of the network."""
    layers = (layer(config, index) for index in range(config.geometry.num_layers))
    return [*top_level(config).values(), *(weight for table in layers for weight in table.values())]


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The names in ChatGLM's layout with the shapes they must have."""
    return {weight.source: weight.shape for weight in every(config)}
