"""Owns the one table of weight names: ours, the checkpoint's, its shape, and transformers' name for it."""

from __future__ import annotations

from dataclasses import dataclass

from glm_export.config import Config

# Recomputed from the config, so that a half-precision copy in the file does no harm.
IGNORED = frozenset({"transformer.rotary_pos_emb.inv_freq"})


@dataclass(frozen=True)
class Weight:
    """One weight of the network. `reference` has several names where transformers splits the rows."""

    source: str
    shape: tuple[int, ...]
    reference: tuple[str, ...]


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
        "lm_head": Weight("transformer.output_layer.weight", vocab, ("lm_head.weight",)),
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
    return {
        role: Weight(ours + source, shape, tuple(theirs + name for name in reference))
        for role, (source, shape, reference) in table.items()
    }


def every(config: Config) -> list[Weight]:
    """All weights of the network."""
    layers = (layer(config, index) for index in range(config.geometry.num_layers))
    return [*top_level(config).values(), *(weight for table in layers for weight in table.values())]


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The checkpoint's names with the shapes they must have."""
    return {weight.source: weight.shape for weight in every(config)}
