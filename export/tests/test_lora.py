"""Owns merged adapters: the export of base and adapter is that of their sum, and nothing else is merged."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from glm_export import cli
from glm_export.error import ExportError
from glm_export.read import config, weights

RANK = 4
LAYER = "transformer.encoder.layers.1."
TARGETS = {
    "self_attention.query_key_value": (128, 64),
    "self_attention.dense": (64, 64),
    "mlp.dense_h_to_4h": (256, 64),
    "mlp.dense_4h_to_h": (64, 128),
}
SETTINGS = {
    **{"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "lora_dropout": 0.1, "bias": "none"},
    **{"use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None},
    **{"target_modules": ["query_key_value"], "rank_pattern": {}, "alpha_pattern": {}},
    "init_lora_weights": True,
}


def adapter(folder, settings=(), change=None):
    folder.mkdir()
    generator = np.random.default_rng(5)
    tensors = {}
    for module, (num_rows, width) in TARGETS.items():
        name = f"base_model.model.{LAYER}{module}.lora_"
        tensors[f"{name}A.weight"] = generator.standard_normal((RANK, width), dtype=np.float32) / 8
        tensors[f"{name}B.weight"] = generator.standard_normal((num_rows, RANK), dtype=np.float32) / 8
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | dict(settings)))
    return tensors


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_an_export_with_an_adapter_is_that_of_the_sum(tiny_checkpoint, tmp_path, use_rslora, scale):
    parts = adapter(tmp_path / "lora", {"use_rslora": use_rslora})
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    for module in TARGETS:
        up, down = (parts[f"base_model.model.{LAYER}{module}.lora_{side}.weight"] for side in "BA")
        name = f"{LAYER}{module}.weight"
        total = tensors[name] + scale * (up.astype(np.float64) @ down)
        assert np.abs(total - tensors[name]).max() > 0.01
        tensors[name] = total.astype(np.float32)
    shutil.copytree(tiny_checkpoint, tmp_path / "summed")
    save_file(tensors, tmp_path / "summed" / "model.safetensors")
    settings = config.load(tiny_checkpoint)
    merged = weights.open_checkpoint(settings, tiny_checkpoint, tmp_path / "lora")
    for name, array in tensors.items():
        np.testing.assert_allclose(merged[name].rows(), array, rtol=0, atol=1e-6)
    for precision in ("fp32", "int4"):
        cli.export(tiny_checkpoint, tmp_path / precision, precision, lora=tmp_path / "lora", name="tuned")
        cli.export(tmp_path / "summed", tmp_path / f"{precision}-summed", precision, name="tuned")
        found, expected = (
            json.loads((tmp_path / folder / "known_answer.json").read_text())
            for folder in (precision, f"{precision}-summed")
        )
        for row, other in zip(found["rows"], expected["rows"], strict=True):
            np.testing.assert_allclose(np.array(row["top"])[:, 1], np.array(other["top"])[:, 1], atol=1e-3)


def test_the_command_line_takes_it(tiny_checkpoint, tmp_path):
    adapter(tmp_path / "lora")
    arguments = [tiny_checkpoint, tmp_path / "out", "--precision", "int8", "--lora", tmp_path / "lora"]
    assert cli.main([str(argument) for argument in arguments]) == 0


def drop_b(tensors):
    del tensors[next(name for name in tensors if name.endswith("B.weight"))]


def embedding(tensors):
    tensors["base_model.model.transformer.embedding.word_embeddings.lora_embedding_A"] = np.zeros(
        (4, 4), np.float32
    )


def elsewhere(tensors):
    for side, shape in {"A": (RANK, 64), "B": (64, RANK)}.items():
        tensors[f"base_model.model.transformer.encoder.layers.9.mlp.up.lora_{side}.weight"] = np.zeros(
            shape, "f4"
        )


def transpose(tensors):
    for name in list(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name].T)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"use_dora": True}, None, "use_dora is True, which is not supported"),
        ({"modules_to_save": ["output_layer"]}, None, "modules_to_save is"),
        ({"bias": "all"}, None, "bias is 'all'"),
        ({"rank_pattern": {"dense": 8}}, None, "rank_pattern is"),
        ({"alpha_pattern": {"dense": 8}}, None, "alpha_pattern is"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights is 'pissa'"),
        ({"peft_type": "PREFIX_TUNING"}, None, "peft_type is 'PREFIX_TUNING'"),
        ({"r": 0}, None, "r is 0, expected a positive number"),
        ({"lora_alpha": "16"}, None, "lora_alpha is '16'"),
        ({"r": 8}, None, r"lora_A.weight has shape \[4, 128\], expected \[8, 128\]"),
        ({}, drop_b, "query_key_value.lora_B.weight is missing"),
        ({}, embedding, "word_embeddings.lora_embedding_A is not the A or B of a linear layer"),
        ({}, elsewhere, "the checkpoint has no transformer.encoder.layers.9.mlp.up.weight"),
        ({}, transpose, r"has shape \[128, 4\], expected \[4, 128\]"),
        ({}, lambda tensors: tensors.clear(), "the adapter has no weights"),
    ],
)
def test_what_cannot_be_merged_is_named(tiny_checkpoint, tmp_path, settings, change, message):
    adapter(tmp_path / "lora", settings, change)
    with pytest.raises(ExportError, match=message):
        cli.export(tiny_checkpoint, tmp_path / "out", "fp32", lora=tmp_path / "lora")
    assert not (tmp_path / "out").exists()


def test_other_folders_are_named(tiny_checkpoint, tmp_path):
    with pytest.raises(ExportError, match="not a checkpoint or a P-Tuning prefix"):
        cli.export(tiny_checkpoint, tmp_path / "out", "fp32", lora=tiny_checkpoint)
    with pytest.raises(ExportError, match=r"adapter_config\.json"):
        cli.export(tiny_checkpoint, tmp_path / "out", "fp32", lora=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(ExportError, match=r"expected adapter_model\.safetensors or adapter_model\.bin"):
        cli.export(tiny_checkpoint, tmp_path / "out", "fp32", lora=tmp_path)


def test_a_p_tuning_checkpoint_is_told_what_to_do(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_seq_len": 128}))
    with pytest.raises(ExportError, match=r"P-Tuning v2 prefix .* train a LoRA adapter"):
        cli.export(tmp_path / "in", tmp_path / "out", "fp32")
