"""Owns tokenizer.json: the same ids as the model's own tokenizer, and no special token in it.

Invariant: whatever a user writes becomes text. Were specials registered, `<|user|>` in a message would become
that role's id, and `philosophy` would hold `sop`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from glm_export.error import ExportError
from glm_export.models.family import TokenizerSource

TOKENIZER_FILE = "tokenizer.json"
SPACE = "▁"
_BPE = 2
_NORMAL, _UNKNOWN, _UNUSED = 1, 2, 5
# How ChatGLM4Tokenizer cuts a text before it looks for tokens.
GLM4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write(source: TokenizerSource, specials: Mapping[str, int], checkpoint: Path, folder: Path) -> None:
    """Writes tokenizer.json from the checkpoint's tokenizer file.

    The pieces of a file that registers no special token must end where those begin: another number of pieces
    means another model's tokenizer, whose ids would be silently wrong.
    """
    path = checkpoint / source.file
    if not path.is_file():
        raise ExportError(f"{path} is missing")
    if path.suffix == ".json":
        text = _without_specials(path, specials)
    else:
        convert = from_sentencepiece if source.pieces == "sentencepiece" else from_tiktoken
        tokenizer = convert(path)
        num_pieces, first_special = tokenizer.get_vocab_size(), min(specials.values())
        if num_pieces != first_special:
            raise ExportError(
                f"{path} has {num_pieces} pieces, but the special tokens begin at "
                f"{first_special}: it belongs to another model"
            )
        text = tokenizer.to_str(pretty=False)
    (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")


def _without_specials(path: Path, specials: Mapping[str, int]) -> str:
    """A tokenizer.json less the special tokens that it registers, which must all be known as such."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        Tokenizer.from_str(json.dumps(content))
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        pieces, merges = content["model"]["vocab"], content["model"].get("merges", [])
    # The binding raises bare Exception.
    except Exception as error:
        raise ExportError(f"{path}: not a tokenizer.json: {error}") from None
    for text, number in added.items():
        if specials.get(text) != number:
            raise ExportError(f"{path}: registers {text!r}; a user could then write it as text")
    # What puts special tokens around a text, cuts it or fills it up is for others.
    content |= dict.fromkeys(("post_processor", "truncation", "padding")) | {"added_tokens": []}
    # A piece of that spelling would be one way more to write it.
    spelt = {_spell(text.encode()): number for text, number in added.items()}
    made = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in merges}
    for text, number in [*added.items(), *spelt.items()]:
        if pieces.get(text) == number:
            if text in made:
                raise ExportError(f"{path}: merges make {text!r}, which is a special token")
            del pieces[text]
    return json.dumps(content, ensure_ascii=False)


def from_tiktoken(path: Path) -> Tokenizer:
    """GLM-4's vocabulary of byte strings and ranks as a tokenizers BPE that gives the same ids.

    tiktoken joins the two neighbours whose bytes make the token of lowest rank, so every split of a token
    into two others is a merge of its rank; a word that is a token as a whole is not even split.
    """
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError as error:
        raise ExportError(f"{path}: not a tiktoken vocabulary: {error}") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ExportError(f"{path}: not a tiktoken vocabulary: its ranks are not 0, 1, 2 and so on")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise ExportError(f"{path}: has no token for the byte {lacking[0]}")
    merges = [
        (_spell(token[:cut]), _spell(token[cut:]))
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    pieces = {_spell(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(pieces, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = glm4_words()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def glm4_words() -> pre_tokenizers.PreTokenizer:
    """Cuts a text into the words inside which GLM-4's tokens lie, spelt as bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GLM4_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _spell(token: bytes) -> str:
    """The printable characters that stand for bytes."""
    return token.decode("latin-1").translate(_SPELLING)


def unspell(piece: str) -> bytes:
    """The bytes that printable characters stand for."""
    return piece.translate(_UNSPELLING).encode("latin-1")


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's table: what Latin-1 prints stands for itself, the other bytes for U+0100 onwards."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printed)
    return {byte: 0x100 + index for index, byte in enumerate(others)}


_SPELLING = _byte_alphabet()
_UNSPELLING = {char: byte for byte, char in _SPELLING.items()}


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
