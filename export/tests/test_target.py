"""Owns what a target may be, and that graphs with candidates compute them right, on the CPU's kernels."""

import json

import numpy as np
import pytest

from glm_export import cli
from glm_export.dev import tiny
from glm_export.error import ExportError
from paged_session import Batch, PagedSession


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    """Heads that CUDA's attention takes."""
    folder = tmp_path_factory.mktemp("wide") / "checkpoint"
    tiny.write(folder, tiny.Shape(head_dim=32))
    return folder


def graph_of(checkpoint, out, *arguments, **options):
    cli.export(checkpoint, out, *arguments, **options)
    return json.loads((out / "manifest.json").read_text())["graph"]


@pytest.mark.parametrize(
    ("precision", "options", "activations", "cache"),
    [
        ("fp16", {}, "float16", "float16"),
        ("bf16", {}, "bfloat16", "bfloat16"),
        ("int4", {}, "float16", "float16"),
        ("int8", {"activations": "bf16"}, "bfloat16", "bfloat16"),
        ("fp16", {"kv_cache_dtype": "float8e4m3fn"}, "float16", "float8e4m3fn"),
    ],
)
def test_manifest_of_a_cuda_graph(wide_checkpoint, tmp_path, precision, options, activations, cache):
    found = graph_of(wide_checkpoint, tmp_path / "out", precision, provider="cuda", **options)
    assert found["provider"] == "cuda"
    assert (found["activation_dtype"], found["kv_cache_dtype"]) == (activations, cache)
    assert (found["block_size"], found["output"]) == (128, "topk")
    assert found["names"]["logsumexp"] == "logsumexp"


@pytest.mark.parametrize(
    ("precision", "options", "cache"),
    [
        ("fp32", {}, "float32"),
        ("fp32", {"kv_cache_dtype": "bfloat16"}, "bfloat16"),
        ("int8", {}, "bfloat16"),
        ("int4", {"kv_cache_dtype": "float32"}, "float32"),
    ],
)
def test_cache_of_a_cpu_graph(wide_checkpoint, tmp_path, precision, options, cache):
    found = graph_of(wide_checkpoint, tmp_path / "out", precision, **options)
    assert (found["activation_dtype"], found["kv_cache_dtype"]) == ("float32", cache)


@pytest.mark.parametrize(
    ("precision", "options", "words"),
    [
        ("fp16", {}, "--provider cpu computes in float32"),
        ("int4", {"activations": "bf16"}, "--provider cpu computes in float32"),
        ("fp32", {"provider": "cuda"}, "no PagedAttention for float32"),
        ("fp16", {"provider": "cuda", "activations": "bf16"}, "--activations bf16"),
        ("fp16", {"provider": "cuda", "kv_cache_dtype": "bfloat16"}, "--kv-cache-dtype bfloat16"),
        ("int8", {"kv_cache_dtype": "int8"}, "--kv-cache-dtype int8: on cpu"),
        ("int8", {"kv_cache_dtype": "float16"}, "or one of bfloat16"),
    ],
)
def test_what_cannot_run_is_refused_by_name(wide_checkpoint, tmp_path, precision, options, words):
    with pytest.raises(ExportError, match=words):
        cli.export(wide_checkpoint, tmp_path / "out", precision, **options)


def test_narrow_rotation_is_refused_for_cuda(tiny_checkpoint, tmp_path):
    with pytest.raises(ExportError, match=r"multiples of 16 channels, not 8 of 16"):
        cli.export(tiny_checkpoint, tmp_path / "out", "fp16", provider="cuda")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ('{"key": [1, 1]}', "value must be 2 positive numbers"),
        ('{"key": [1], "value": [1, 1]}', "key must be 2 positive numbers"),
        ('{"key": [1, 0], "value": [1, 1]}', "key must be 2 positive numbers"),
        ('{"key": [1, "x"], "value": [1, 1]}', "key must be"),
    ],
)
def test_wrong_scales_are_named(wide_checkpoint, tmp_path, content, words):
    (tmp_path / "scales.json").write_text(content)
    with pytest.raises(ExportError, match=words):
        cli.export(
            wide_checkpoint,
            tmp_path / "out",
            "fp16",
            provider="cuda",
            kv_cache_dtype="int8",
            kv_cache_scales=tmp_path / "scales.json",
        )


def test_candidates_are_the_best_of_the_vocabulary(tiny_checkpoint, tmp_path):
    cli.export(tiny_checkpoint, tmp_path / "out", "fp32", output="topk")
    session = PagedSession(tmp_path / "out", 4)
    found = session.run_all(Batch(32).add([5, 6, 7], 0, [1], "all"))
    vocab_size = json.loads((tmp_path / "out" / "manifest.json").read_text())["geometry"]["vocab_size"]
    real = found["logits"][:, :vocab_size]
    assert real.shape[1] < found["logits"].shape[1]
    order = np.argsort(-real, axis=1, kind="stable")[:, :64]
    np.testing.assert_array_equal(found["topk_ids"], order)
    np.testing.assert_array_equal(found["topk_values"], np.take_along_axis(real, order, axis=1))
    expected = np.log(np.exp(real.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found["logsumexp"], expected, rtol=1e-6)
