"""Owns what config.json, generation_config.json and glm_export.json say.

Invariant: a Config that exists describes a network that graph/onnx_graph.py can express exactly; everything
else was refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_export.error import ExportError
from glm_export.models import family
from glm_export.models.family import Member, TokenizerSource
from glm_export.read import native
from glm_export.read.json_file import read_object

ROPE_BASE = 10_000.0
OVERRIDES_FILE = "glm_export.json"
OVERRIDES = {"name", "member", "license", "origin", "rope_ratio", "vocab_size", "tokenizer", "chat"}
# Our names of sizes, and the keys of config.json in the authors' layout and in transformers'.
CHATGLM_KEYS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "padded_vocab_size": "padded_vocab_size",
    "max_model_len": "seq_length",
    "ffn_size": "ffn_hidden_size",
    "norm_epsilon": "layernorm_epsilon",
}
GLM_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "padded_vocab_size": "vocab_size",
    "max_model_len": "max_position_embeddings",
    "ffn_size": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
}

# As in the engine's manifest.rs: beyond any network's, so a typing error.
LARGEST_SIZE = 1 << 24


@dataclass(frozen=True)
class Chat:
    """How messages become token ids, and which ids end a reply."""

    format: str
    special_tokens: dict[str, int]
    stop_token_ids: list[int]
    default_system: str | None = None


# What the graph assumes. A checkpoint that says otherwise computes something else.
REQUIRED = {
    "multi_query_attention": True,
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": False,
}
NATIVE_REQUIRED = {"hidden_act": "silu"}


@dataclass(frozen=True)
class Geometry:
    """Sizes of the network, under the manifest's names."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    padded_vocab_size: int
    vocab_size: int
    max_model_len: int

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of the packed queries, keys and values."""
        return (self.num_attention_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class Config:
    """All that the exporter knows of a checkpoint before it reads a weight."""

    geometry: Geometry
    ffn_size: int
    norm_epsilon: float
    rope_base: float
    # What positions are divided by before they become angles.
    position_divisor: float
    qkv_bias: bool
    # Whether weights have transformers' names, with queries, keys and values apart.
    is_native: bool
    # Whether the LM head is the embedding.
    is_tied: bool
    architecture: str
    name: str
    license: str | None
    origin: str | None
    chat: Chat
    tokenizer: TokenizerSource
    generation: dict[str, float]


def load(folder: Path, max_model_len: int | None = None) -> Config:
    """Reads config.json, generation_config.json and the overrides of a checkpoint folder."""
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder")
    raw = read_object(folder / "config.json")
    overrides = _Fields(_read_if_there(folder / OVERRIDES_FILE), OVERRIDES_FILE)
    unknown = sorted(overrides.raw.keys() - OVERRIDES)
    if unknown:
        raise ExportError(f"{OVERRIDES_FILE}: {unknown[0]} is not known, expected one of {sorted(OVERRIDES)}")
    family.refuse_relatives(raw)
    is_native = raw["model_type"] == "glm"
    _refuse_unsupported(raw, NATIVE_REQUIRED if is_native else REQUIRED)
    has_chat = "chat" in overrides.raw
    ends = [*_end_ids(raw, "config.json"), *_end_ids(*_generation_config(folder))]
    if is_native:
        for key in ("member", "rope_ratio"):
            if key in overrides.raw:
                raise ExportError(f"{OVERRIDES_FILE}: {key} has no meaning for a model_type of 'glm'")
        member = native.member(folder, ends, has_chat)
    else:
        member = family.recognise(folder, raw, overrides.text("member"), has_chat)

    fields = _Fields(raw, "config.json")
    keys = GLM_KEYS if is_native else CHATGLM_KEYS
    sizes = {name: fields.integer(key) for name, key in keys.items() if name != "norm_epsilon"}
    ffn_size, longest = sizes.pop("ffn_size"), sizes["max_model_len"]
    if max_model_len is not None and not 0 < max_model_len <= longest:
        raise ExportError(
            f"--max-model-len {max_model_len} is not between 1 and {keys['max_model_len']} {longest}"
        )
    rotation = _native_rotation(raw) if is_native else _rotation(fields, overrides, member)
    geometry = Geometry(
        **sizes | {"max_model_len": max_model_len or longest},
        rotary_dim=int(sizes["head_dim"] * rotation.share),
        vocab_size=overrides.integer("vocab_size", member.vocab_size),
    )
    _check_geometry(geometry, keys)
    return Config(
        geometry=geometry,
        ffn_size=ffn_size,
        norm_epsilon=fields.number(keys["norm_epsilon"]),
        rope_base=rotation.base,
        position_divisor=rotation.position_divisor,
        qkv_bias=bool(raw.get("attention_bias", True) if is_native else raw.get("add_qkv_bias", False)),
        is_native=is_native,
        is_tied=is_native and bool(raw.get("tie_word_embeddings", False)),
        architecture=member.architecture,
        name=overrides.text("name") or folder.resolve().name.lower(),
        license=overrides.text("license"),
        origin=overrides.text("origin"),
        chat=_chat(overrides, member, ends, geometry.vocab_size),
        tokenizer=_tokenizer(overrides, member),
        generation=dict(member.generation) | _generation(folder),
    )


@dataclass(frozen=True)
class Rotation:
    """How positions become angles: the share of a head's channels that rotate, base and divisor."""

    share: float
    base: float
    position_divisor: float


def _rotation(fields: _Fields, overrides: _Fields, member: Member) -> Rotation:
    # What is hard-coded wins, as it does in the authors' code.
    ratio, longest = member.rope_ratio, fields.integer("seq_length")
    is_told = ratio is not None or "rope_ratio" in fields.raw | overrides.raw
    if longest > 32_768 and not is_told:
        raise ExportError(
            f"config.json: seq_length {longest} without rope_ratio: LongAlign keeps its ratio (200 for "
            f"LongAlign-6B-64k) in code; put rope_ratio in {OVERRIDES_FILE}"
        )
    ratio = overrides.number("rope_ratio", ratio or fields.number("rope_ratio", 1.0))
    return Rotation(0.5, ROPE_BASE, ratio) if member.linear else Rotation(0.5, ROPE_BASE * ratio, 1.0)


def _native_rotation(raw: dict[str, Any]) -> Rotation:
    """Transformers 5 has one object for it, earlier releases have keys of their own and `rope_scaling`."""
    # Of the top level's keys, only those that the object lacks count.
    nested = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(nested, dict):
        raise ExportError("config.json: rope_parameters is not an object")
    fields = _Fields(raw | nested, "config.json")
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ExportError(f"config.json: rope_type {kind!r} is not supported, expected default or linear")
    share = fields.number("partial_rotary_factor", 0.5)
    if share > 1:
        raise ExportError(f"config.json: partial_rotary_factor is {share}, expected at most 1")
    divisor = fields.number("factor") if kind == "linear" else 1.0
    return Rotation(share, fields.number("rope_theta", ROPE_BASE), divisor)


def _refuse_unsupported(raw: dict[str, Any], required: dict[str, Any]) -> None:
    for key, wanted in required.items():
        # An absent key leaves the authors' default, which for these two is not what the graph computes.
        found = raw.get(key, False if key in ("multi_query_attention", "tie_word_embeddings") else wanted)
        if (bool(found) if isinstance(wanted, bool) else found) != wanted:
            raise ExportError(f"config.json: {key} is {found}, only {str(wanted).lower()} is supported")
    if raw.get("quantization_bit"):
        raise ExportError("config.json: quantization_bit is set; export the unquantised checkpoint")
    if raw.get("pre_seq_len"):
        raise ExportError(
            "config.json: pre_seq_len is set: a P-Tuning v2 prefix cannot be merged and is not supported; "
            "export the base model, or train a LoRA adapter and name it with --lora"
        )


def _end_ids(raw: dict[str, Any], file: str) -> list[int]:
    """Ids that end a text, one or a list of them."""
    found = raw.get("eos_token_id")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in listed):
        raise ExportError(f"{file}: eos_token_id is {found!r}, expected token ids")
    return listed


def _check_geometry(geometry: Geometry, keys: dict[str, str]) -> None:
    if geometry.num_attention_heads % geometry.num_kv_heads:
        raise ExportError(
            f"config.json: num_attention_heads {geometry.num_attention_heads} is not a multiple of "
            f"{keys['num_kv_heads']} {geometry.num_kv_heads}"
        )
    if geometry.rotary_dim % 2 or not geometry.rotary_dim:
        raise ExportError(
            f"config.json: of {keys['head_dim']} {geometry.head_dim}, {geometry.rotary_dim} rotate, which is "
            "not an even number"
        )
    if geometry.vocab_size > geometry.padded_vocab_size:
        raise ExportError(
            f"vocab_size {geometry.vocab_size} is larger than {keys['padded_vocab_size']} "
            f"{geometry.padded_vocab_size}; a model with another tokenizer needs it in {OVERRIDES_FILE}"
        )


def _chat(overrides: _Fields, member: Member, ends: list[int], vocab_size: int) -> Chat:
    raw = overrides.raw.get("chat")
    where = f"{OVERRIDES_FILE}: chat" if raw is not None else "eos_token_id and added tokens"
    try:
        if raw is None:
            stops = list(dict.fromkeys([*member.stop_token_ids, *ends]))
            chat = Chat(member.format, dict(member.special_tokens), stops)
        else:
            chat = Chat(**raw)
        ids = [*chat.special_tokens.values(), *chat.stop_token_ids]
        if not chat.stop_token_ids or not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
            raise TypeError(
                f"special and stop ids must be whole numbers below {vocab_size}, one stop at least"
            )
    except (TypeError, AttributeError) as error:
        raise ExportError(f"{where}: {error}") from None
    return chat


def _tokenizer(overrides: _Fields, member: Member) -> TokenizerSource:
    raw = overrides.raw.get("tokenizer")
    if raw is None:
        return member.tokenizer
    try:
        return TokenizerSource(**raw)
    except TypeError as error:
        raise ExportError(f"{OVERRIDES_FILE}: tokenizer: {error}") from None


def _generation_config(folder: Path) -> tuple[dict[str, Any], str]:
    name = "generation_config.json"
    return _read_if_there(folder / name), name


def _generation(folder: Path) -> dict[str, float]:
    raw, file = _generation_config(folder)
    known = ("temperature", "top_p", "top_k", "repetition_penalty")
    fields = _Fields(raw, file)
    return {key: fields.sampling(key) for key in known if raw.get(key) is not None}


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


@dataclass(frozen=True)
class _Fields:
    """Typed access to a JSON object; errors name file and key."""

    raw: dict[str, Any]
    file: str

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST_SIZE:
            raise ExportError(
                f"{self.file}: {key} is {value!r}, expected a positive whole number up to {LARGEST_SIZE}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ExportError(f"{self.file}: {key} is {value!r}, expected a positive number")
        return float(value)

    def sampling(self, key: str) -> float:
        """A sampling default; top_k counts, the others measure, and 0 has a meaning for each."""
        value = self.raw[key]
        kinds = int if key == "top_k" else int | float
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ExportError(f"{self.file}: {key} is {value!r}, expected a number that is not negative")
        return value

    def text(self, key: str) -> str | None:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            raise ExportError(f"{self.file}: {key} is {value!r}, expected text")
        return value
