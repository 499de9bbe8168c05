"""Owns tokenizer exactness: the same ids as sentencepiece, and no way to write a special token."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from glm_export import tokenizer
from glm_export.config import CHATGLM3_IDS, CHATGLM3_SPECIALS, TokenizerSource
from glm_export.error import ExportError

SHARED = Path(os.environ.get("GLM_SHARED", Path(__file__).parents[3] / "shared")) / "data"
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
    for text in (*TEXTS, *strings(3000, 0)):
        assert converted.encode(text).ids == source.encode(text), repr(text)


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
    found = [CHATGLM3_IDS["[gMASK]"], CHATGLM3_IDS["sop"]]
    for message in content["messages"]:
        found += [CHATGLM3_IDS[f"<|{message['role']}|>"], *encode("\n"), *encode(message["content"])]
    assert [*found, CHATGLM3_IDS["<|assistant|>"]] == content["ids"]
    short = [CHATGLM3_IDS["[gMASK]"], CHATGLM3_IDS["sop"], CHATGLM3_IDS["<|user|>"]]
    short += [*encode("\n"), *encode("你好"), CHATGLM3_IDS["<|assistant|>"]]
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
        tokenizer.write(TokenizerSource("tokenizer.json", "byte_level"), 0, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "not a tokenizer.json"),
        ("tokenizer.model", "no protobuf", "not a "),
        ("tokenizer.txt", "", "come from a tokenizer.json only"),
    ],
)
def test_broken_files_are_named(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    pieces = "sentencepiece" if file.endswith(".model") else "byte_level"
    with pytest.raises(ExportError, match=message):
        tokenizer.write(TokenizerSource(file, pieces), 0, tmp_path, tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"tokenizer\.model is missing"):
        tokenizer.write(TokenizerSource("tokenizer.model", "sentencepiece"), 0, tmp_path, tmp_path)


def test_another_models_tokenizer_is_refused(tmp_path, tiny_checkpoint):
    source = TokenizerSource("tokenizer.model", "sentencepiece")
    with pytest.raises(ExportError, match=r"480 pieces, but the special tokens begin at 64789"):
        tokenizer.write(source, 64789, tiny_checkpoint, tmp_path)
