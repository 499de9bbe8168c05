"""Owns the tokenizer of random models: each word of the load generator is one token, in every server.

Invariant: merges only ever lengthen a word's beginning, space included, by one letter, so a text has one
tokenisation and a prompt of n words has n tokens. Random weights pick ids at random, and nearly every id is
plain text: no server holds a token back because its bytes are no letter yet.
"""

import re
from itertools import product
from string import ascii_lowercase

from glm_export.read.tokenizer import from_byte_level
from tokenizers import Tokenizer, pre_tokenizers

from .paths import WORDS

SPACE = "Ġ"
NUM_WORDS = 64


def bench_words() -> list[str]:
    """The words that `glmserve bench` makes its prompts of."""
    words = re.findall(r'^    "([a-z]+)",$', WORDS.read_text(), re.MULTILINE)
    if len(words) != NUM_WORDS:
        raise ValueError(f"{WORDS} holds {len(words)} words of a prompt, expected {NUM_WORDS}")
    return words


def build(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens by id, and merges by rank."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    known, merges = set(tokens), []

    def add(start: str, letter: str) -> None:
        if start + letter not in known and len(tokens) < size:
            known.add(start + letter)
            tokens.append(start + letter)
            merges.append((start, letter))

    for word in bench_words():
        for end in range(len(word)):
            add(SPACE + word[:end], word[end])
    for length in (1, 2, 3, 4):
        for letters in product(ascii_lowercase, repeat=length):
            add(SPACE + "".join(letters[:-1]), letters[-1])
    if len(tokens) != size:
        raise ValueError(f"a vocabulary of {size} cannot be made, only of {len(tokens)}")
    return tokens, merges


def tokenizer(size: int) -> Tokenizer:
    """The tokenizer of `size` tokens, without specials."""
    return from_byte_level(*build(size))
