"""Owns what the exporter refuses, by name, before it reads a weight."""

import json

import pytest

from glm_export import config
from glm_export.error import ExportError

CHATGLM3_6B = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
}
GLM4 = CHATGLM3_6B | {"padded_vocab_size": 151552, "rope_ratio": 500, "seq_length": 131072, "num_layers": 40}


def load(folder, overrides=None, max_model_len=None, **changes):
    raw = {key: value for key, value in (CHATGLM3_6B | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    if overrides is not None:
        (folder / "glm_export.json").write_text(json.dumps(overrides))
    return config.load(folder, max_model_len)


def test_chatglm3_6b(tmp_path):
    found = load(tmp_path)
    assert found.geometry == config.Geometry(28, 4096, 32, 2, 128, 64, 65024, 64798, 8192)
    assert (found.ffn_size, found.rope_base, found.qkv_bias) == (13696, 10_000, True)
    assert found.chat.special_tokens["[gMASK]"] == 64790
    assert found.chat.special_tokens["<|observation|>"] == 64797
    assert found.chat.stop_token_ids == [2, 64795, 64797]
    assert found.generation == {"temperature": 0.8, "top_p": 0.8}


def test_longer_members_scale_the_base(tmp_path):
    found = load(tmp_path, seq_length=32768, rope_ratio=50, max_model_len=4096)
    assert (found.rope_base, found.geometry.max_model_len) == (500_000, 4096)
    assert found.architecture == "chatglm3"


def test_generation_config_wins_over_the_family(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5, "max_length": 9}')
    assert load(tmp_path).generation == {"temperature": 0.8, "top_p": 0.5}


def test_generation_config_is_checked(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"top_k": 2.5}')
    with pytest.raises(ExportError, match=r"generation_config\.json: top_k is 2\.5"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"multi_query_attention": False}, "multi_query_attention is False"),
        ({"multi_query_attention": ...}, "multi_query_attention is False"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"quantization_bit": 4}, "quantization_bit"),
        ({"pre_seq_len": 128}, "prefix tuning"),
        ({"position_encoding_2d": True}, "the first one"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', expected a positive whole number"),
        ({"num_layers": ...}, "num_layers is None"),
        ({"num_attention_heads": 33}, "not a multiple of multi_query_group_num"),
        ({"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 16}, "linear"),
        ({"_name_or_path": "THUDM/chatglm2-6b", "seq_length": 32768}, "no chat format is known for chatglm2"),
        ({"_name_or_path": "x", "seq_length": 32768}, "no chat format is known for chatglm2"),
        ({"_name_or_path": "THUDM/LongAlign-6B-64k", "seq_length": 65536}, "LongAlign"),
        (GLM4, "no chat format is known for glm-4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ExportError, match=message):
        load(tmp_path, **changes)


def test_linear_positions_are_seen_in_the_code_too(tmp_path):
    (tmp_path / "modeling_chatglm.py").write_text("seq_idx = torch.arange(0, seq_len) / self.rope_ratio\n")
    with pytest.raises(ExportError, match="linear"):
        load(tmp_path, rope_ratio=16)


def test_overrides_supply_what_the_family_does_not(tmp_path):
    overrides = {
        "name": "longalign",
        "rope_ratio": 200,
        "vocab_size": 100,
        "chat": {"format": "chatml", "special_tokens": {"<s>": 1}, "stop_token_ids": [1]},
        "tokenizer": {"file": "tokenizer.json", "pieces": "byte_level"},
    }
    found = load(tmp_path, overrides, seq_length=65536)
    assert (found.name, found.rope_base, found.geometry.vocab_size) == ("longalign", 2_000_000, 100)
    assert (found.chat.format, found.tokenizer.pieces) == ("chatml", "byte_level")


def test_unknown_override_is_named(tmp_path):
    with pytest.raises(ExportError, match="stop_tokens"):
        load(tmp_path, {"chat": {"stop_tokens": []}})
    with pytest.raises(ExportError, match="licence is not known"):
        load(tmp_path, {"licence": "MIT"})
    with pytest.raises(ExportError, match="below 64798"):
        load(tmp_path, {"chat": {"format": "x", "special_tokens": {"a": 64798}, "stop_token_ids": [2]}})


def test_length_beyond_training_is_refused(tmp_path):
    with pytest.raises(ExportError, match="--max-model-len 8193 is not between 1 and seq_length 8192"):
        load(tmp_path, max_model_len=8193)


def test_missing_config_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"config\.json is missing"):
        config.load(tmp_path)
