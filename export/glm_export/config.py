"""Owns the family: what config.json and glm_export.json say, and how its members differ.

Invariant: a Config that exists describes a network that graph.py can express exactly; everything else was
refused by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_export.error import ExportError

ROPE_BASE = 10_000.0
OVERRIDES_FILE = "glm_export.json"
OVERRIDES = {"name", "license", "origin", "rope_ratio", "vocab_size", "tokenizer", "chat"}


# As in the engine's manifest.rs: beyond any network's, so a typing error.
LARGEST_SIZE = 1 << 24


@dataclass(frozen=True)
class Chat:
    """How messages become token ids, and which ids end a reply."""

    format: str
    special_tokens: dict[str, int]
    stop_token_ids: list[int]
    default_system: str | None = None


@dataclass(frozen=True)
class TokenizerSource:
    """The tokenizer file of the checkpoint, and how its pieces spell bytes."""

    file: str
    pieces: str


@dataclass(frozen=True)
class Member:
    """What a member of the family has besides its config.json; None is what this exporter cannot supply."""

    name: str
    vocab_size: int
    chat: Chat | None
    tokenizer: TokenizerSource | None
    generation: dict[str, float] = field(default_factory=dict)


# The ids follow the 64,789 pieces of tokenizer.model: the authors' code appends them, no file lists them.
CHATGLM3_SPECIALS = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
CHATGLM3_IDS = {text: 64_789 + i for i, text in enumerate(CHATGLM3_SPECIALS)}
SENTENCEPIECE = TokenizerSource("tokenizer.model", "sentencepiece")
API_DEFAULTS = {"temperature": 0.8, "top_p": 0.8}

CHATGLM3 = Member(
    name="chatglm3",
    vocab_size=64_798,
    # </s> ends a reply, and so does the next role: the user's turn or a tool's result.
    chat=Chat("chatglm3", CHATGLM3_IDS, [2, CHATGLM3_IDS["<|user|>"], CHATGLM3_IDS["<|observation|>"]]),
    tokenizer=SENTENCEPIECE,
    generation=API_DEFAULTS,
)
# Same network and tokenizer file, but rounds of plain text in place of role tokens.
CHATGLM2 = Member("chatglm2", 64_794, chat=None, tokenizer=SENTENCEPIECE, generation=API_DEFAULTS)
GLM4 = Member("glm-4", 151_343, chat=None, tokenizer=None, generation=API_DEFAULTS)

# What the graph assumes. A checkpoint that says otherwise computes something else.
REQUIRED = {
    "multi_query_attention": True,
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": False,
}


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
    qkv_bias: bool
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
    raw = _read_object(folder / "config.json")
    overrides = _Fields(_read_object(folder / OVERRIDES_FILE, missing_ok=True), OVERRIDES_FILE)
    unknown = sorted(overrides.raw.keys() - OVERRIDES)
    if unknown:
        raise ExportError(f"{OVERRIDES_FILE}: {unknown[0]} is not known, expected one of {sorted(OVERRIDES)}")
    _refuse_unsupported(folder, raw)
    member = _member(raw)
    fields = _Fields(raw, "config.json")

    seq_length = fields.integer("seq_length")
    if max_model_len is not None and not 0 < max_model_len <= seq_length:
        raise ExportError(f"--max-model-len {max_model_len} is not between 1 and seq_length {seq_length}")
    head_dim = fields.integer("kv_channels")
    geometry = Geometry(
        num_layers=fields.integer("num_layers"),
        hidden_size=fields.integer("hidden_size"),
        num_attention_heads=fields.integer("num_attention_heads"),
        num_kv_heads=fields.integer("multi_query_group_num"),
        head_dim=head_dim,
        rotary_dim=head_dim // 2,
        padded_vocab_size=fields.integer("padded_vocab_size"),
        vocab_size=overrides.integer("vocab_size", member.vocab_size),
        max_model_len=max_model_len or seq_length,
    )
    _check_geometry(geometry)
    return Config(
        geometry=geometry,
        ffn_size=fields.integer("ffn_hidden_size"),
        norm_epsilon=fields.number("layernorm_epsilon"),
        rope_base=ROPE_BASE * overrides.number("rope_ratio", fields.number("rope_ratio", 1.0)),
        qkv_bias=bool(raw.get("add_qkv_bias", False)),
        architecture=member.name,
        name=overrides.text("name") or folder.resolve().name.lower(),
        license=overrides.text("license"),
        origin=overrides.text("origin"),
        chat=_chat(overrides, member, geometry.vocab_size),
        tokenizer=_tokenizer(overrides, member),
        generation=member.generation | _generation(folder),
    )


def _member(raw: dict[str, Any]) -> Member:
    if raw.get("padded_vocab_size", 0) > 100_000:
        return GLM4
    origin = str(raw.get("_name_or_path", "")).lower()
    # ChatGLM2 reaches 32k with the plain base; of ChatGLM3 only the 8k model has no rope_ratio.
    plain_32k = raw.get("seq_length") == 32_768 and "rope_ratio" not in raw
    return CHATGLM2 if "chatglm2" in origin or plain_32k else CHATGLM3


def _refuse_unsupported(folder: Path, raw: dict[str, Any]) -> None:
    if raw.get("model_type") != "chatglm":
        raise ExportError(f"config.json: model_type is {raw.get('model_type')!r}, expected 'chatglm'")
    if raw.get("position_encoding_2d"):
        raise ExportError("config.json: position_encoding_2d is ChatGLM-6B (the first one), another network")
    for key, wanted in REQUIRED.items():
        # An absent key leaves the authors' default, which for these two is not what the graph computes.
        found = raw.get(key, False if key in ("multi_query_attention", "tie_word_embeddings") else wanted)
        if bool(found) is not wanted:
            raise ExportError(f"config.json: {key} is {found}, only {str(wanted).lower()} is supported")
    if "codegeex" in str(raw.get("_name_or_path", "")).lower():
        raise ExportError("config.json: codegeex2 has no role tokens; its chat format is not supported")
    if raw.get("quantization_bit"):
        raise ExportError("config.json: quantization_bit is set; export the unquantised checkpoint")
    if raw.get("pre_seq_len"):
        raise ExportError("config.json: pre_seq_len is set; prefix tuning is not supported")
    modeling = folder / "modeling_chatglm.py"
    code = modeling.read_text(encoding="utf-8", errors="replace") if modeling.is_file() else ""
    named = "chatglm2-6b-32k" in str(raw.get("_name_or_path", "")).lower()
    if named or "/ self.rope_ratio" in code:
        raise ExportError("chatglm2-6b-32k divides positions by rope_ratio (linear); that is not supported")
    if raw.get("seq_length", 0) > 32_768 and "rope_ratio" not in raw:
        overrides = _read_object(folder / OVERRIDES_FILE, missing_ok=True)
        if "rope_ratio" not in overrides:
            raise ExportError(
                f"config.json: seq_length {raw['seq_length']} without rope_ratio: LongAlign keeps its ratio "
                f"(200 for LongAlign-6B-64k) in code; put rope_ratio in {OVERRIDES_FILE}"
            )


def _check_geometry(geometry: Geometry) -> None:
    if geometry.num_attention_heads % geometry.num_kv_heads:
        raise ExportError(
            f"config.json: num_attention_heads {geometry.num_attention_heads} is not a multiple of "
            f"multi_query_group_num {geometry.num_kv_heads}"
        )
    if geometry.rotary_dim % 2 or not geometry.rotary_dim:
        raise ExportError(f"config.json: kv_channels {geometry.head_dim} is not a multiple of 4")
    if geometry.vocab_size > geometry.padded_vocab_size:
        raise ExportError(
            f"vocab_size {geometry.vocab_size} is larger than padded_vocab_size "
            f"{geometry.padded_vocab_size}; a model with another tokenizer needs it in {OVERRIDES_FILE}"
        )


def _chat(overrides: _Fields, member: Member, vocab_size: int) -> Chat:
    raw = overrides.raw.get("chat")
    if raw is None:
        if member.chat is None:
            raise ExportError(f"no chat format is known for {member.name}: put `chat` in {OVERRIDES_FILE}")
        return member.chat
    try:
        chat = Chat(**raw)
        ids = [*chat.special_tokens.values(), *chat.stop_token_ids]
        if not chat.stop_token_ids or not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
            raise TypeError(
                f"special and stop ids must be whole numbers below {vocab_size}, one stop at least"
            )
    except (TypeError, AttributeError) as error:
        raise ExportError(f"{OVERRIDES_FILE}: chat: {error}") from None
    return chat


def _tokenizer(overrides: _Fields, member: Member) -> TokenizerSource:
    raw = overrides.raw.get("tokenizer")
    if raw is None:
        if member.tokenizer is None:
            raise ExportError(
                f"the tokenizer of {member.name} is not supported: put `tokenizer` in {OVERRIDES_FILE}"
            )
        return member.tokenizer
    try:
        return TokenizerSource(**raw)
    except TypeError as error:
        raise ExportError(f"{OVERRIDES_FILE}: tokenizer: {error}") from None


def _generation(folder: Path) -> dict[str, float]:
    raw = _read_object(folder / "generation_config.json", missing_ok=True)
    known = ("temperature", "top_p", "top_k", "repetition_penalty")
    fields = _Fields(raw, "generation_config.json")
    return {key: fields.sampling(key) for key in known if raw.get(key) is not None}


def _read_object(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise ExportError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path}: expected a JSON object")
    return value


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
