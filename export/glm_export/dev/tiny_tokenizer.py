"""Owns the tokenizers of tiny checkpoints, one of each kind that the family has, trained on our own text."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE

from glm_export.read import tokenizer

NUM_PIECES = 480
# Our own text, so that the shipped tokenizer is nobody else's. Repeated words give the trainer its merges.
CORPUS = (
    "The server reads a request, schedules it, runs a step and streams the answer token by token.",
    "A block holds the keys and values of sixteen tokens; a sequence owns a table of blocks.",
    "Please tell me about the weather in the city today, and whether I should take an umbrella.",
    "people love philosophy, and developers keep stepping through the code: sop, eop, and so on.",
    "What is one plus one? One plus one is two. What is two plus two? Two plus two is four.",
    "请问今天的天气怎么样？今天的天气很好，我们可以出去走走。",
    "你好，我是一个很小的模型，我的权重是随机的，所以我的回答没有意义。",
    "服务器把请求排队，然后一步一步地运行模型，并把每个词元发送给客户端。",
    'tool_call(city="Beijing", unit=\'celsius\')\n{"name": "get_weather", "parameters": {"type": "object"}}',
)


def train_sentencepiece() -> bytes:
    """A sentencepiece model with the real one's settings and few pieces."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 8),
        model_writer=trained,
        model_type="bpe",
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return trained.getvalue()


def train_tiktoken(corpus: tuple[str, ...] = CORPUS, num_pieces: int = NUM_PIECES) -> bytes:
    """A vocabulary as GLM-4's file has it: a token in base64 and its rank, a line each."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = tokenizer.glm4_words()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces, initial_alphabet=sorted(alphabet), show_progress=False
    )
    trained.train_from_iterator(corpus * 8, trainer)
    pieces = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    lines = (f"{base64.b64encode(tokenizer.unspell(text)).decode()} {rank}\n" for text, rank in pieces)
    return "".join(lines).encode()


def write_json(tiktoken: bytes, specials: Mapping[str, int], folder: Path) -> None:
    """A tokenizer.json as transformers writes it for these tokens: special ones are registered."""
    source = folder / "tokenizer.model"
    source.write_bytes(tiktoken)
    converted = tokenizer.from_tiktoken(source)
    source.unlink()
    converted.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    content = json.loads(converted.to_str())
    assert {token["content"]: token["id"] for token in content["added_tokens"]} == specials
    (folder / "tokenizer.json").write_text(converted.to_str(), encoding="utf-8")
