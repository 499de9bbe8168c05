"""Owns tokenizer.json: the same ids as the model's own tokenizer, and no special token in it.

Invariant: whatever a user writes becomes text. Were specials registered, `<|user|>` in a message would become
that role's id, and `philosophy` would hold `sop`.
"""

from __future__ import annotations

import json
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from glm_export.config import TokenizerSource
from glm_export.error import ExportError

TOKENIZER_FILE = "tokenizer.json"
SPACE = "▁"
_BPE = 2
_NORMAL, _UNKNOWN, _UNUSED = 1, 2, 5


def write(source: TokenizerSource, first_special: int, checkpoint: Path, folder: Path) -> None:
    """Writes tokenizer.json from the checkpoint's tokenizer file.

    A sentencepiece file's pieces must end where the special tokens begin: another number of pieces
    means another model's tokenizer, whose ids would be silently wrong.
    """
    path = checkpoint / source.file
    if not path.is_file():
        raise ExportError(f"{path} is missing")
    if path.suffix == ".json":
        text = _checked_json(path)
    elif source.pieces == "sentencepiece":
        tokenizer = from_sentencepiece(path)
        if tokenizer.get_vocab_size() != first_special:
            raise ExportError(
                f"{path} has {tokenizer.get_vocab_size()} pieces, but the special tokens begin at "
                f"{first_special}: it belongs to another model"
            )
        text = tokenizer.to_str(pretty=False)
    else:
        raise ExportError(f"{path}: pieces {source.pieces!r} come from a tokenizer.json only")
    (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")


def _checked_json(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    try:
        Tokenizer.from_str(text)
        added = json.loads(text).get("added_tokens", [])
    # The binding raises bare Exception.
    except Exception as error:
        raise ExportError(f"{path}: not a tokenizer.json: {error}") from None
    if added:
        raise ExportError(
            f"{path}: registers {added[0].get('content')!r}; a user could then write it as text"
        )
    return text


def from_sentencepiece(path: Path) -> Tokenizer:
    """The sentencepiece BPE model as a tokenizers BPE that gives the same ids."""
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ExportError(f"{path}: not a sentencepiece model: {error}") from None
    _refuse_unsupported(path, model)

    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    # sentencepiece merges the best-scored pair first; its scores fall with the id, so rank is id order.
    normal = {piece.piece for piece in model.pieces if piece.type == _NORMAL}
    ranked = sorted(normal, key=lambda text: (-model.pieces[vocabulary[text]].score, vocabulary[text]))
    merges = [
        (text[:cut], text[cut:])
        for text in ranked
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    unknown = next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN)
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    # For people with the Python library; the server's own detokenizer is exact on broken UTF-8, this is not.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _refuse_unsupported(path: Path, model: sentencepiece_model_pb2.ModelProto) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    expected = {
        "model_type BPE": trainer.model_type == _BPE,
        "byte_fallback": trainer.byte_fallback,
        "identity normaliser": normalizer.name == "identity" and not normalizer.precompiled_charsmap,
        "add_dummy_prefix": normalizer.add_dummy_prefix,
        "kept whitespace": not normalizer.remove_extra_whitespaces,
        "escaped whitespace": normalizer.escape_whitespaces,
        "prefix, not suffix, spaces": not trainer.treat_whitespace_as_suffix,
        # User-defined pieces would match before the merges and could be written by a user.
        "no user-defined piece": all(piece.type not in (4, _UNUSED) for piece in model.pieces),
    }
    for what, holds in expected.items():
        if not holds:
            raise ExportError(f"{path}: not a ChatGLM tokenizer: expected {what}")


def from_byte_level(tokens: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """GPT-2's byte-level BPE with digits split one by one, as SmolLM2 has it."""
    tokenizer = Tokenizer(BPE({text: index for index, text in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
