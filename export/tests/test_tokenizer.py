"""Owns tokenizer exactness: the same ids as sentencepiece and tiktoken, no way to write a special token."""

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from glm_export.dev import tiny, tiny_tokenizer
from glm_export.error import ExportError
from glm_export.models.family import (
    CHATGLM3,
    CHATGLM3_SPECIALS,
    GLM4_SPECIALS,
    SENTENCEPIECE,
    TIKTOKEN,
    TokenizerSource,
    numbered,
)
from glm_export.read import config, tokenizer

SHARED = Path(os.environ.get("GLM_SHARED", Path(__file__).parents[3] / "shared")) / "data"
IDS = CHATGLM3.special_tokens
TEXTS = (
    *("", " ", "  ", "\n", "\t\n", "a", " a", "a ", "你好", "philosophy people", "1234567890", "3.14159"),
    *("<|user|>\n", "[gMASK]sop", "<s></s><unk>", "<0x0A>", "▁", "a▁b", "👋🏽 café naïve e\u0301", "\ufffd"),
    *("def f(x):\n    return x ** 2\n", "请问今天天气怎么样?", "\x00\x01\x7f", "\u200b\u3000\xa0", "ﬁ①Ⅳ"),
)
ALPHABETS = (
    *("aaab ", "the server  \n", "0123 .", "你好天气的 ，。", "<|user|>sop[]", "▁ a", "👋é\u0301\u200dß"),
    "".join(map(chr, range(32, 127))),
)


def strings(count, seed):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        alphabet = list(ALPHABETS[generator.integers(len(ALPHABETS))])
        yield "".join(generator.choice(alphabet, generator.integers(1, 40)))


@pytest.fixture(scope="module", params=["trained", "real"])
def pair(request, tiny_checkpoint):
    """sentencepiece and its conversion."""
    path = tiny_checkpoint / "tokenizer.model"
    if request.param == "real":
        path = SHARED / "chatglm3-tokenizer.model"
        if not path.is_file():
            pytest.skip("chatglm3-tokenizer.model is not free to ship; GLM_SHARED names a folder that has it")
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), tokenizer.from_sentencepiece(path)


def test_ids_equal_sentencepiece(pair):
    source, converted = pair
    # The real one has 64,789 pieces to go wrong at, and takes a thousandth of a second for ten strings.
    count = 3000 if source.get_piece_size() == tiny.NUM_PIECES else 100_000
    texts = [*TEXTS, *strings(count, 0)]
    for text, found in zip(texts, converted.encode_batch_fast(texts), strict=True):
        assert found.ids == source.encode(text), repr(text)


def test_text_of_special_tokens_stays_text(pair):
    source, converted = pair
    for text in CHATGLM3_SPECIALS:
        assert converted.token_to_id(text) is None or text in ("sop", "eop")
        assert max(converted.encode(text).ids) < source.get_piece_size()
    assert converted.get_added_tokens_decoder() == {}


def test_golden_chat_of_the_real_model():
    golden, model = SHARED / "chatglm3-chat-golden.json", SHARED / "chatglm3-tokenizer.model"
    if not (golden.is_file() and model.is_file()):
        pytest.skip("the real tokenizer is not free to ship; GLM_SHARED names a folder that has it")
    converted = tokenizer.from_sentencepiece(model)

    def encode(text):
        return converted.encode(text).ids

    content = json.loads(golden.read_text(encoding="utf-8"))
    found = [IDS["[gMASK]"], IDS["sop"]]
    for message in content["messages"]:
        found += [
            IDS[f"<|{message['role']}|>"],
            *encode("\n"),
            *encode(message["content"]),
        ]
    assert [*found, IDS["<|assistant|>"]] == content["ids"]
    short = [
        IDS["[gMASK]"],
        IDS["sop"],
        IDS["<|user|>"],
    ]
    short += [*encode("\n"), *encode("你好"), IDS["<|assistant|>"]]
    assert short == [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]


def test_byte_level_spells_specials_out():
    characters = sorted(tokenizer.pre_tokenizers.ByteLevel.alphabet())
    converted = tokenizer.from_byte_level(["<|im_start|>", *characters, "he"], [("h", "e")])
    ids = converted.encode("<|im_start|>he 12").ids
    assert 0 not in ids
    assert converted.decode(ids) == "<|im_start|>he 12"


def test_tokenizer_json_with_added_tokens_is_refused(tmp_path):
    added = tokenizer.from_byte_level(["a"], [])
    added.add_special_tokens(["<|user|>"])
    added.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ExportError, match=r"registers '<\|user\|>'"):
        tokenizer.write(TokenizerSource("tokenizer.json", "byte_level"), {"<|user|>": 2}, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "not a tokenizer.json"),
        ("tokenizer.model", "no protobuf", "not a "),
        ("tokenizer.tiktoken", "YQ== 0\nYg==\n", "not a tiktoken vocabulary"),
        ("tokenizer.tiktoken", "YQ== 0\nYg== 2\n", "its ranks are not 0, 1, 2"),
        ("tokenizer.tiktoken", "YQ== 0\nYg== 1\n", "no token for the byte 0"),
    ],
)
def test_broken_files_are_named(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    pieces = "sentencepiece" if file.endswith(".model") else "byte_level"
    with pytest.raises(ExportError, match=message):
        tokenizer.write(TokenizerSource(file, pieces), {}, tmp_path, tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"tokenizer\.model is missing"):
        tokenizer.write(SENTENCEPIECE, {}, tmp_path, tmp_path)


def test_another_models_tokenizer_is_refused(tmp_path, tiny_checkpoint):
    with pytest.raises(ExportError, match=r"480 pieces, but the special tokens begin at 64789"):
        tokenizer.write(SENTENCEPIECE, CHATGLM3.special_tokens, tiny_checkpoint, tmp_path)


# Words that repeat themselves, where the order of merges shows.
PERIODIC = ("ab", "aab", "abc", "aaab", "abab ", "啊哈", "12", "\r\n", " \n")


def vocabularies():
    generator = np.random.default_rng(1)
    words = tuple("".join(generator.choice(list(alphabet), 30)) for alphabet in PERIODIC for _ in range(40))
    return {"text": (tiny_tokenizer.CORPUS, 480), "periodic": (words + tiny_tokenizer.CORPUS, 1200)}


@pytest.mark.parametrize("name", vocabularies())
def test_ids_equal_tiktoken(tmp_path, name):
    tiktoken = pytest.importorskip("tiktoken", reason="the reference is tiktoken: pip install '.[test]'")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiny_tokenizer.train_tiktoken(*vocabularies()[name]))
    pairs = (line.split() for line in path.read_text().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    source = tiktoken.Encoding("glm4", pat_str=tokenizer.GLM4_WORDS, mergeable_ranks=ranks, special_tokens={})
    converted = tokenizer.from_tiktoken(path)
    generator = np.random.default_rng(2)
    texts = [*TEXTS, *strings(10_000, 3)]
    for alphabet in (*PERIODIC, "'sSſtTveEmlLdD K", "a1 \n\t.,;", *(tiny_tokenizer.CORPUS)):
        characters = list(alphabet)
        texts += ["".join(generator.choice(characters, generator.integers(1, 60))) for _ in range(500)]
    if name == "text":
        # Every character that one unit of UTF-16 holds, in places that the words' pattern tells apart.
        codes = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
        texts += [f"a{char}b 1{char}\n{char}. '{char}" for char in codes]
    for text, found in zip(texts, converted.encode_batch_fast(texts), strict=True):
        assert found.ids == source.encode_ordinary(text), repr(text)
    # What is whole comes back whole.
    assert converted.decode(converted.encode(TEXTS[-1]).ids) == TEXTS[-1]


def test_glm4s_words_are_cut_as_the_authors_cut_them():
    words = tokenizer.glm4_words().pre_tokenize_str("I'll pay 12345 元，\n\n  ok")
    found = [tokenizer.unspell(word).decode() for word, _ in words]
    assert found == ["I", "'ll", " pay", " ", "123", "45", " 元", "，\n\n", " ", " ok"]


def test_registered_special_tokens_are_taken_out_of_a_native_tokenizer(tmp_path):
    tiny.write(tmp_path / "checkpoint", member="glm-4-9b-chat-hf")
    settings = config.load(tmp_path / "checkpoint")
    assert settings.chat.special_tokens == numbered(GLM4_SPECIALS, tiny.NUM_PIECES)
    tokenizer.write(settings.tokenizer, settings.chat.special_tokens, tmp_path / "checkpoint", tmp_path)
    source = tokenizer.Tokenizer.from_file(str(tmp_path / "checkpoint" / "tokenizer.json"))
    converted = tokenizer.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for special, number in settings.chat.special_tokens.items():
        assert source.encode(f"a{special}b", add_special_tokens=False).ids.count(number) == 1
        assert max(converted.encode(f"a{special}b {special}").ids) < tiny.NUM_PIECES
    for text in strings(1000, 4):
        if not any(special in text for special in GLM4_SPECIALS):
            assert converted.encode(text).ids == source.encode(text, add_special_tokens=False).ids


def test_a_special_token_is_not_a_piece_either(tmp_path):
    tiny_tokenizer.write_json(tiny_tokenizer.train_tiktoken(), {"<sop>": 480}, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["<sop>"] = 480
    path.write_text(json.dumps(content))
    out = tmp_path / "out"
    out.mkdir()
    source = TokenizerSource("tokenizer.json", "byte_level")
    tokenizer.write(source, {"<sop>": 480}, tmp_path, out)
    assert "<sop>" not in json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    content["model"]["merges"].append(["<so", "p>"])
    content["model"]["vocab"] |= {"<so": 481, "p>": 482}
    path.write_text(json.dumps(content))
    with pytest.raises(ExportError, match="merges make '<sop>'"):
        tokenizer.write(source, {"<sop>": 480}, tmp_path, out)


def test_another_models_tiktoken_vocabulary_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer.train_tiktoken())
    with pytest.raises(ExportError, match="480 pieces, but the special tokens begin at 151329"):
        tokenizer.write(TIKTOKEN, numbered(GLM4_SPECIALS, 151_329), tmp_path, tmp_path)
