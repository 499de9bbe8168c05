"""Owns the family: every published member as a few lines of data, and how a folder is recognised as one.

Invariant: between two members that differ there is no guess; the error says what to write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glm_export.error import ExportError


@dataclass(frozen=True)
class TokenizerSource:
    """The tokenizer file of the checkpoint, and how its pieces spell bytes."""

    file: str
    pieces: str


@dataclass(frozen=True)
class Member:
    """What a published model has besides its config.json."""

    architecture: str
    tokenizer: TokenizerSource
    # Text to id; the authors' code appends them to the tokenizer's pieces, no file lists them.
    special_tokens: Mapping[str, int]
    # Name of the chat format; `none` is a base model, which goes on with a text.
    format: str
    stop_token_ids: tuple[int, ...]
    # Ids below it are real.
    vocab_size: int
    # What the authors' API uses.
    generation: Mapping[str, float] = field(default_factory=lambda: {"temperature": 0.8, "top_p": 0.8})
    # Kept in the code of the checkpoint, where config.json has none.
    rope_ratio: float | None = None
    # Whether the ratio divides positions, and not multiplies the base.
    linear: bool = False


NO_CHAT = "none"
MASKS = ("[MASK]", "[gMASK]", "[sMASK]")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
MEDIA = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
CHATGLM2_SPECIALS = (*MASKS, "sop", "eop")
CHATGLM3_SPECIALS = (*CHATGLM2_SPECIALS, *ROLES)
GLM4_SPECIALS = ("<|endoftext|>", *MASKS, "<sop>", "<eop>", *ROLES, *MEDIA)
# A reply ends with the text, or where the next turn begins: the user's, or a tool's result.
NEXT_TURN = ("<|user|>", "<|observation|>")
END_OF_SENTENCEPIECE = 2
SENTENCEPIECE = TokenizerSource("tokenizer.model", "sentencepiece")
TIKTOKEN = TokenizerSource("tokenizer.model", "byte_level")


def numbered(specials: tuple[str, ...], first: int) -> dict[str, int]:
    """Ids of special tokens that follow a tokenizer's pieces."""
    return {text: first + index for index, text in enumerate(specials)}


def stops(specials: Mapping[str, int], chat_format: str) -> tuple[int, ...]:
    """Ids that end a reply in the format, by the tokens that there are."""
    end = specials.get("<|endoftext|>", END_OF_SENTENCEPIECE)
    has_turns = chat_format not in (NO_CHAT, "chatglm2")
    return (end, *(specials[text] for text in NEXT_TURN if has_turns and text in specials))


def _member(
    architecture: str, tokenizer: TokenizerSource, specials: tuple[str, ...], first: int, chat_format: str
) -> Member:
    ids = numbered(specials, first)
    return Member(
        architecture, tokenizer, ids, chat_format, stops(ids, chat_format), vocab_size=first + len(ids)
    )


CHATGLM2 = _member("chatglm2", SENTENCEPIECE, CHATGLM2_SPECIALS, 64_789, "chatglm2")
CHATGLM2_BASE = _member("chatglm2", SENTENCEPIECE, CHATGLM2_SPECIALS, 64_789, NO_CHAT)
CHATGLM3 = _member("chatglm3", SENTENCEPIECE, CHATGLM3_SPECIALS, 64_789, "chatglm3")
CHATGLM3_BASE = _member("chatglm3", SENTENCEPIECE, CHATGLM3_SPECIALS, 64_789, NO_CHAT)
GLM4 = _member("glm-4", TIKTOKEN, GLM4_SPECIALS, 151_329, "glm4")
GLM4_BASE = _member("glm-4", TIKTOKEN, GLM4_SPECIALS, 151_329, NO_CHAT)

# By published name. Those in transformers' own layout (GLM-Edge, -hf) say all this themselves: native.py.
MEMBERS = {
    "chatglm3-6b": CHATGLM3,
    "chatglm3-6b-32k": CHATGLM3,
    "chatglm3-6b-128k": CHATGLM3,
    "chatglm3-6b-base": CHATGLM3_BASE,
    "chatglm2-6b": CHATGLM2,
    "chatglm2-6b-32k": replace(CHATGLM2, linear=True),
    "codegeex2-6b": CHATGLM2_BASE,
    # Trained on rounds, with ChatGLM2's tokenizer.
    "longalign-6b-64k": replace(CHATGLM2, rope_ratio=200.0),
    "longalign-6b-64k-base": replace(CHATGLM2_BASE, rope_ratio=200.0),
    "glm-4-9b-chat": GLM4,
    "glm-4-9b-chat-1m": GLM4,
    "glm-4-9b": GLM4_BASE,
}

# Relatives with another network.
REFUSED_TYPES = {
    "glm4": "GLM-4-0414, whose layers have two more norms",
    "glm4_moe": "GLM-4.5, a mixture of experts",
    "cogvlm": "CogVLM or CogAgent, which see images",
    "cogagent": "CogAgent, which sees images",
    "chatglm4v": "GLM-4V, which sees images",
}
# Keys of a config.json that only they have.
REFUSED_KEYS = {
    "position_encoding_2d": "ChatGLM-6B (the first one)",
    "inner_hidden_size": "ChatGLM-6B (the first one)",
    "vision_config": "GLM-4V or CogAgent, which see images",
}


def refuse_relatives(raw: Mapping[str, Any]) -> None:
    """Refuses by name what only looks like a member."""
    kind = raw.get("model_type")
    for key, what in REFUSED_KEYS.items():
        if raw.get(key):
            raise ExportError(f"config.json: {key} is that of {what}: another network")
    if isinstance(kind, str) and kind in REFUSED_TYPES:
        raise ExportError(f"config.json: model_type {kind!r} is {REFUSED_TYPES[kind]}: another network")
    if kind not in ("chatglm", "glm"):
        raise ExportError(f"config.json: model_type is {kind!r}, expected 'chatglm' or 'glm'")


def recognise(folder: Path, raw: Mapping[str, Any], named: str | None, has_chat: bool) -> Member:
    """The member that a folder in ChatGLM's layout holds.

    `named` is what glm_export.json says; `has_chat` tells that it says how to chat as well.
    """
    if named is not None and named not in MEMBERS:
        raise ExportError(f"glm_export.json: member is {named!r}, expected one of {', '.join(MEMBERS)}")
    code = _code(folder)
    name = named or _by_name(raw, folder) or _by_numbers(raw, code, has_chat)
    member = MEMBERS[name]
    ratio = re.search(r"self\.ratio *= *(\d+(?:\.\d+)?)\b", code)
    return replace(
        member,
        linear=member.linear or bool(re.search(r"/ *self\.rope_ratio", code)),
        rope_ratio=float(ratio[1]) if ratio else member.rope_ratio,
    )


def _code(folder: Path) -> str:
    modeling = folder / "modeling_chatglm.py"
    return modeling.read_text(encoding="utf-8", errors="replace") if modeling.is_file() else ""


def _by_name(raw: Mapping[str, Any], folder: Path) -> str | None:
    """The longest published name in the one that the checkpoint was saved under, or in the folder's."""
    for place in (str(raw.get("_name_or_path", "")), folder.resolve().name):
        last = place.lower().rstrip("/").rsplit("/", 1)[-1]
        found = [name for name in MEMBERS if name in last]
        if found:
            return max(found, key=len)
    return None


def _by_numbers(raw: Mapping[str, Any], code: str, has_chat: bool) -> str:
    if raw.get("padded_vocab_size", 0) > 100_000:
        return "glm-4-9b-chat"
    if re.search(r"/ *self\.rope_ratio", code):
        return "chatglm2-6b-32k"
    if "self.ratio" in code:
        return "longalign-6b-64k"
    if raw.get("seq_length") == 32_768 and "rope_ratio" not in raw and not has_chat:
        raise ExportError(
            "config.json: chatglm2-6b, chatglm3-6b-base and others have these numbers; put its name as "
            '"member" in glm_export.json'
        )
    return "chatglm3-6b"
