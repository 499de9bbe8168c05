"""Owns what checkpoints in transformers' layout (model_type `glm`: GLM-Edge, glm-4-9b-chat-hf) say of
themselves, where the authors' own layout leaves it to code: special tokens, chat format, rotation.

Invariant: a template or a rotation that is not known to be computed alike is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_export.error import ExportError
from glm_export.models.family import NEXT_TURN, NO_CHAT, Member, TokenizerSource
from glm_export.read.json_file import read_object

TOKENIZER = TokenizerSource("tokenizer.json", "byte_level")


def member(folder: Path, eos_token_ids: list[int], has_chat: bool) -> Member:
    """What the files beside the weights say; `has_chat` tells that glm_export.json says how to chat."""
    content = read_object(folder / TOKENIZER.file)
    try:
        pieces = content["model"]["vocab"]
        specials = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        vocab_size = 1 + max([*pieces.values(), *specials.values()])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ExportError(f"{folder / TOKENIZER.file}: not a tokenizer.json: {error!r}") from None
    chat_format = NO_CHAT if has_chat else _chat_format(folder, specials)
    turns = [specials[text] for text in NEXT_TURN if text in specials and chat_format != NO_CHAT]
    ends = tuple(dict.fromkeys([*eos_token_ids, *turns]))
    return Member("glm", TOKENIZER, specials, chat_format, ends, vocab_size)


def _chat_format(folder: Path, specials: Mapping[str, int]) -> str:
    """The format that the template is: GLM-4's begins with `[gMASK]<sop>`, GLM-Edge's does not."""
    file = folder / "chat_template.jinja"
    template: Any = None
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    elif (folder / "tokenizer_config.json").is_file():
        template = read_object(folder / "tokenizer_config.json").get("chat_template")
    if template is None:
        return NO_CHAT
    # Only these are known to be followed by the roles' turns as chat_format.rs writes them.
    if isinstance(template, str) and "<|assistant|>" in template and "<|assistant|>" in specials:
        return "glm4" if "[gMASK]<sop>" in template else "glm-edge"
    raise ExportError("the chat template is neither GLM-4's nor GLM-Edge's: put `chat` in glm_export.json")
