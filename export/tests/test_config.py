"""Owns what the exporter refuses, by name, before it reads a weight."""

import json

import pytest

from glm_export.error import ExportError
from glm_export.models.family import GLM4_SPECIALS
from glm_export.read import config

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
GLM4 = CHATGLM3_6B | {
    "_name_or_path": "THUDM/glm-4-9b-chat",
    "eos_token_id": [151329, 151336, 151338],
    "layernorm_epsilon": 1.5625e-07,
    "num_layers": 40,
    "padded_vocab_size": 151552,
    "rope_ratio": 500,
    "seq_length": 131072,
}
GLM_EDGE = {
    "model_type": "glm",
    "attention_bias": False,
    "eos_token_id": [59246, 59253, 59255],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "vocab_size": 59264,
}


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
        ({"model_type": []}, r"model_type is \[\]"),
        ({"multi_query_attention": False}, "multi_query_attention is False"),
        ({"multi_query_attention": ...}, "multi_query_attention is False"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"quantization_bit": 4}, "quantization_bit"),
        ({"pre_seq_len": 128}, "P-Tuning v2 prefix"),
        ({"position_encoding_2d": True}, "the first one"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', expected a positive whole number"),
        ({"num_layers": ...}, "num_layers is None"),
        ({"num_attention_heads": 33}, "not a multiple of multi_query_group_num"),
        ({"inner_hidden_size": 16384}, "the first one"),
        ({"vision_config": {"hidden_size": 1}}, "CogAgent"),
        ({"model_type": "glm4"}, "two more norms"),
        ({"_name_or_path": "x", "seq_length": 32768}, '"member" in glm_export'),
        ({"_name_or_path": "x", "seq_length": 65536}, "LongAlign"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ExportError, match=message):
        load(tmp_path, **changes)


VOCAB_SIZES = {"chatglm3": 64798, "glm-4-9b": 151343}
MEMBERS = [
    # Name, what config.json has, format, base, divisor of positions, stop ids.
    ("chatglm3-6b-32k", {"rope_ratio": 50, "seq_length": 32768}, "chatglm3", 5e5, 1, [2, 64795, 64797]),
    ("chatglm3-6b-128k", {"rope_ratio": 500, "seq_length": 131072}, "chatglm3", 5e6, 1, [2, 64795, 64797]),
    ("chatglm3-6b-base", {"seq_length": 32768}, "none", 1e4, 1, [2]),
    ("chatglm2-6b", {"seq_length": 32768}, "chatglm2", 1e4, 1, [2]),
    ("chatglm2-6b-32k", {"rope_ratio": 16, "seq_length": 32768}, "chatglm2", 1e4, 16, [2]),
    ("codegeex2-6b", {}, "none", 1e4, 1, [2]),
    ("LongAlign-6B-64k", {"seq_length": 65536}, "chatglm2", 2e6, 1, [2]),
    ("LongAlign-6B-64k-base", {"seq_length": 65536}, "none", 2e6, 1, [2]),
    ("glm-4-9b-chat", GLM4, "glm4", 5e6, 1, [151329, 151336, 151338]),
    ("glm-4-9b", GLM4, "none", 5e6, 1, [151329, 151336, 151338]),
    ("glm-4-9b-chat-1m", GLM4 | {"rope_ratio": 10000}, "glm4", 1e8, 1, [151329, 151336, 151338]),
]


@pytest.mark.parametrize("by_folder", [False, True], ids=["saved-name", "folder-name"])
@pytest.mark.parametrize(("name", "raw", "chat", "base", "divisor", "stops"), MEMBERS)
def test_members_are_recognised(tmp_path, by_folder, name, raw, chat, base, divisor, stops):
    folder = tmp_path / (name.lower() if by_folder else "checkpoint")
    folder.mkdir()
    found = load(folder, **raw | {"_name_or_path": "" if by_folder else f"THUDM/{name}"})
    assert (found.chat.format, found.rope_base, found.position_divisor) == (chat, base, divisor)
    assert found.chat.stop_token_ids == stops
    assert found.geometry.vocab_size == VOCAB_SIZES.get(name[:8], 64794)


def test_glm4_is_recognised_by_its_vocabulary(tmp_path):
    found = load(tmp_path, **GLM4 | {"_name_or_path": "/home/someone/ours"})
    assert (found.chat.format, found.tokenizer.pieces) == ("glm4", "byte_level")
    assert found.chat.special_tokens["<|user|>"] == 151336


def test_what_is_hard_coded_is_seen_in_the_code(tmp_path):
    modeling = tmp_path / "modeling_chatglm.py"
    modeling.write_text("seq_idx = torch.arange(0, seq_len) / self.rope_ratio\n")
    found = load(tmp_path, rope_ratio=16)
    assert (found.rope_base, found.position_divisor) == (10_000, 16)
    modeling.write_text("        self.ratio = 200\n        base = base * self.ratio\n")
    found = load(tmp_path, _name_or_path="ours", seq_length=65536)
    assert (found.rope_base, found.position_divisor, found.chat.format) == (2_000_000, 1, "chatglm2")


def test_an_end_that_a_fine_tune_adds_counts(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 64796]}')
    assert load(tmp_path, eos_token_id=2).chat.stop_token_ids == [2, 64795, 64797, 64796]


def test_a_member_is_named(tmp_path):
    assert load(tmp_path, {"member": "chatglm3-6b-base"}, seq_length=32768).chat.format == "none"
    with pytest.raises(ExportError, match="member is 'llama'"):
        load(tmp_path, {"member": "llama"})


def native(folder, template="<|user|>\n<|assistant|>", overrides=None, **changes):
    specials = {text: 59246 + index for index, text in enumerate(GLM4_SPECIALS)}
    added = [{"content": text, "id": number} for text, number in specials.items()]
    content = {"model": {"vocab": {"a": 0}}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "config.json").write_text(json.dumps(GLM_EDGE | changes))
    if overrides is not None:
        (folder / "glm_export.json").write_text(json.dumps(overrides))
    return config.load(folder)


def test_glm_edge(tmp_path):
    found = native(tmp_path)
    assert found.geometry == config.Geometry(28, 2048, 16, 4, 128, 128, 59264, 59260, 8192)
    assert (found.ffn_size, found.rope_base, found.qkv_bias, found.is_tied) == (6144, 10_000, False, False)
    assert (found.chat.format, found.chat.stop_token_ids) == ("glm-edge", [59246, 59253, 59255])
    assert found.chat.special_tokens["<|assistant|>"] == 59254


def test_native_rotation_of_each_release(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    found = native(tmp_path, "[gMASK]<sop><|user|>\n<|assistant|>", rope_parameters=rope)
    assert (found.rope_base, found.geometry.rotary_dim, found.chat.format) == (5e6, 64, "glm4")
    found = native(tmp_path, rope_scaling={"type": "linear", "factor": 4.0})
    assert (found.rope_base, found.geometry.rotary_dim, found.position_divisor) == (10_000, 128, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({"head_dim": None}, "head_dim is None"),
        ({"template": "[INST] {{ message }} [/INST]"}, "neither GLM-4's nor GLM-Edge's"),
        ({"overrides": {"rope_ratio": 2}}, "rope_ratio has no meaning"),
        ({"eos_token_id": None, "template": None}, "one stop at least"),
    ],
)
def test_native_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ExportError, match=message):
        native(tmp_path, **changes)


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
