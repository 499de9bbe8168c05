"""Owns the exported folder: its manifest, its files, its atomic appearance, and errors as one line."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file
from test_config import CHATGLM3_6B

from glm_export import cli
from glm_export.dev import tiny
from glm_export.error import ExportError
from glm_export.graph import manifest
from glm_export.graph.external_data import ALIGNMENT
from glm_export.graph.target import Target
from glm_export.read import config
from glm_export.read.checkpoint import Checkpoint

GEOMETRY = [
    *("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    *("padded_vocab_size", "vocab_size", "max_model_len"),
]
GRAPH = [
    *("file", "precision", "provider", "activation_dtype", "kv_cache_dtype", "block_size", "output"),
    *("kernel", "names"),
]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "tiny-int8"
    (tiny_checkpoint / "LICENSE").write_text("terms")
    cli.export(tiny_checkpoint, folder, "int8")
    return folder


def test_manifest_has_exactly_the_fields_that_rust_reads(exported):
    found = json.loads((exported / "manifest.json").read_text())
    assert {key: sorted(value) if isinstance(value, dict) else value for key, value in found.items()} == {
        "schema_version": 1,
        "generator": "glm-export 0.1.0",
        "model": ["architecture", "license", "name", "origin"],
        "geometry": sorted(GEOMETRY),
        "graph": sorted(GRAPH),
        "tokenizer": ["file", "pieces"],
        "chat": ["default_system", "format", "special_tokens"],
        "stop_token_ids": [2, 486, 488],
        "generation": ["temperature", "top_p"],
        "files": ["LICENSE", "known_answer.json", "model.onnx", "model.onnx.data", "tokenizer.json"],
        "digest": found["digest"],
    }
    assert found["graph"]["precision"] == "int8"
    assert found["graph"]["block_size"] == 32
    assert found["chat"]["special_tokens"]["<|user|>"] == 486


def test_golden_manifest(tmp_path):
    """The Rust side parses the same file, so a change on either side fails on one of them."""
    (tmp_path / "chatglm3-6b").mkdir()
    (tmp_path / "chatglm3-6b" / "config.json").write_text(json.dumps(CHATGLM3_6B))
    settings = config.load(tmp_path / "chatglm3-6b")
    files = {
        name: {"bytes": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()}
        for name in ("model.onnx", "model.onnx.data", "tokenizer.json")
    }
    found = manifest.describe(settings, Target("int4", kernel="glmserve"), files)
    golden = Path(__file__).parent / "golden" / "manifest.json"
    if os.environ.get("GLM_WRITE_GOLDEN"):
        golden.write_text(manifest.to_text(found), encoding="utf-8")
    assert manifest.to_text(found) == golden.read_text(encoding="utf-8")


def test_files_and_digest_are_true(exported):
    found = json.loads((exported / "manifest.json").read_text())
    on_disk = {path.name for path in exported.iterdir()} - {"manifest.json"}
    assert on_disk == found["files"].keys()
    for name, entry in found["files"].items():
        content = (exported / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    lines = "".join(f"{name} {found['files'][name]['sha256']}\n" for name in sorted(on_disk))
    assert found["digest"] == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    assert found["digest"] == manifest.digest(found["files"])


def test_graph_inputs_and_outputs(exported):
    graph = onnx.load(exported / "model.onnx", load_external_data=False).graph
    names = json.loads((exported / "manifest.json").read_text())["graph"]["names"]
    caches = [names[role].format(layer=layer) for layer in (0, 1) for role in ("key_cache", "value_cache")]
    plain = {name for role, name in names.items() if role not in ("key_cache", "value_cache", "logits")}
    assert {value.name for value in graph.input} == plain | set(caches)
    assert [value.name for value in graph.output] == [names["logits"]]
    for value in graph.input:
        wanted = onnx.TensorProto.BFLOAT16 if value.name in caches else onnx.TensorProto.INT32
        assert value.type.tensor_type.elem_type == wanted
    cache = next(value for value in graph.input if value.name == caches[0])
    assert [dim.dim_value for dim in cache.type.tensor_type.shape.dim] == [0, 32, 2, 16]


def test_every_tensor_is_aligned_and_none_overlaps(exported):
    graph = onnx.load(exported / "model.onnx", load_external_data=False).graph
    end = 0
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert int(place["offset"]) % ALIGNMENT == 0
        assert int(place["offset"]) >= end
        end = int(place["offset"]) + int(place["length"])
    assert (exported / "model.onnx.data").stat().st_size == end


def test_zero_bias_is_left_out(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["transformer.encoder.layers.1.self_attention.query_key_value.bias"][:] = 0
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    cli.export(tmp_path / "in", tmp_path / "out", "fp32")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    names = {tensor.name for tensor in graph.initializer}
    assert "layers.0.qkv.bias" in names
    assert "layers.1.qkv.bias" not in names


def test_same_input_gives_the_same_digest(tiny_checkpoint, tmp_path, exported):
    found = cli.export(tiny_checkpoint, tmp_path / "again", "int8")
    assert found == json.loads((exported / "manifest.json").read_text())["digest"]


def test_tiny_is_deterministic_and_seeded(tiny_checkpoint, tmp_path):
    tiny.write(tmp_path / "same")
    tiny.write(tmp_path / "other", seed=1)
    for file in ("config.json", "glm_export.json", "tokenizer.model", "model.safetensors"):
        assert (tmp_path / "same" / file).read_bytes() == (tiny_checkpoint / file).read_bytes()
    name = "transformer.output_layer.weight"
    first, other = (Checkpoint(folder)[name].rows() for folder in (tmp_path / "same", tmp_path / "other"))
    assert not np.allclose(first, other)


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_existing_folder_needs_force(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, tiny_checkpoint, out, "--precision", "int8")[0] == 0
    before = (out / "manifest.json").read_text()
    code, _, error = run(capsys, tiny_checkpoint, out, "--precision", "int4")
    assert (code, error.count("\n")) == (1, 1)
    assert "--force" in error
    assert (out / "manifest.json").read_text() == before
    code, text, _ = run(capsys, tiny_checkpoint, out, "--precision", "int4", "--name", "other", "--force")
    assert code == 0
    found = json.loads((out / "manifest.json").read_text())
    assert found["model"]["name"] == "other"
    assert found["digest"] in text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failure_leaves_nothing(tiny_checkpoint, tmp_path, capsys):
    shutil.copytree(tiny_checkpoint, tmp_path / "in")
    (tmp_path / "in" / "tokenizer.model").write_text("broken")
    code, _, error = run(capsys, tmp_path / "in", tmp_path / "out", "--precision", "fp32")
    assert (code, error.count("\n")) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_mistakes_are_one_line(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    for arguments, message in [
        ([tmp_path / "no", out, "--precision", "fp32"], "is not a folder"),
        ([tmp_path, out, "--precision", "fp32"], "config.json is missing"),
        ([tiny_checkpoint, out, "--precision", "fp32", "--block-size", "24"], "power of two from 16 to 256"),
        ([tiny_checkpoint, out, "--precision", "fp32", "--max-model-len", "513"], "seq_length 512"),
        ([tiny_checkpoint, tiny_checkpoint / "config.json" / "x", "--precision", "fp32"], "config.json"),
        ([tiny_checkpoint, out, "--precision", "fp32", "--check", "--glmserve", "no/such"], "no/such"),
    ]:
        code, _, error = run(capsys, *arguments)
        assert code == 1
        assert message in error
        assert error.count("\n") == 1
        assert error.startswith("glm-export: ")


def test_missing_tensor_is_named_with_its_shape(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ExportError, match=rf"{name} is missing, expected shape \[64, 128\]"):
        cli.export(tmp_path / "in", tmp_path / "out", "fp32")


@pytest.mark.parametrize("out", ["checkpoint", "."])
def test_the_checkpoint_is_never_replaced(tiny_checkpoint, tmp_path, capsys, monkeypatch, out):
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    before = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, "link", out, "--precision", "fp32", "--force")
    assert code == 1
    assert "must not be or contain the checkpoint" in error
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == before


def test_force_replaces_only_what_was_made_here(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    code, _, error = run(capsys, tiny_checkpoint, tmp_path / "mine", "--precision", "fp32", "--force")
    assert code == 1
    assert "was not made by this program" in error
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_force_follows_a_link(tiny_checkpoint, tmp_path, capsys):
    assert run(capsys, tiny_checkpoint, tmp_path / "real", "--precision", "fp32")[0] == 0
    (tmp_path / "link").symlink_to(tmp_path / "real")
    code, _, _ = run(capsys, tiny_checkpoint, tmp_path / "link", "--precision", "int8", "--force")
    assert code == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real" / "manifest.json").read_text())["graph"]["precision"] == "int8"


@pytest.mark.parametrize(
    ("key", "value"),
    [("layernorm_epsilon", "NaN"), ("rope_ratio", "Infinity"), ("seq_length", "10000000000000")],
)
def test_sizes_beyond_reason_are_refused(tiny_checkpoint, tmp_path, capsys, key, value):
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "config.json"
    config = json.loads(path.read_text()) | {key: "PLACE"}
    path.write_text(json.dumps(config).replace('"PLACE"', value))
    code, _, error = run(capsys, tmp_path / "checkpoint", tmp_path / "out", "--precision", "fp32")
    assert code == 1
    assert key in error
    assert len(error.splitlines()) == 1
