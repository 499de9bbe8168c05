"""Owns the proof that the scales of a quantised cache are measured, one a channel, and that they serve."""

import json

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

from glm_export.cli import export
from glm_export.dev import tiny
from glm_export.error import ExportError
from glm_export.graph import interpreter, onnx_graph, paged_attention
from glm_export.graph.initializers import Weights

IDS = [5, 80, 33, 7, 120, 64, 250, 99, 41, 12, 180, 301]
LARGEST = {"int8": 127, "int4": 7, "float8e4m3fn": 448}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of one checkpoint by the type of their cache."""
    out = tmp_path_factory.mktemp("kv")
    tiny.write(out / "checkpoint", tiny.Shape(head_dim=32))
    export(out / "checkpoint", out / "float16", "fp16", provider="cuda")
    for kind in LARGEST:
        export(out / "checkpoint", out / kind, "fp16", provider="cuda", kv_cache_dtype=kind)
    (out / "given.json").write_text(json.dumps({"key": [0.5, 0.25], "value": [0.125, 1]}))
    scales = out / "given.json"
    export(
        out / "checkpoint",
        out / "given",
        "fp16",
        provider="cuda",
        kv_cache_dtype="int8",
        kv_cache_scales=scales,
    )
    return out


def opened(folder):
    graph = onnx.load(folder / onnx_graph.GRAPH_FILE, load_external_data=False).graph
    attentions = [node for node in graph.node if node.op_type == "PagedAttention"]
    return attentions, Weights.of_folder(folder, graph.initializer)


def granularity(node):
    found = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return found["k_quant_type"], found["v_quant_type"]


@pytest.mark.parametrize("kind", LARGEST)
def test_each_channel_has_a_scale_that_its_largest_number_fits(folders, kind):
    attentions, weights = opened(folders / kind)
    assert len(attentions) == 2
    for node in attentions:
        assert granularity(node) == (b"PER_CHANNEL", b"PER_CHANNEL")
        for position in (paged_attention.KEY_SCALE, paged_attention.VALUE_SCALE):
            scales = weights.rows(node.input[position])
            assert (scales.shape, scales.dtype) == ((2, 1, 32), np.float32)
            assert (scales > 0).all()
            assert len(np.unique(scales)) > 32
    # One checkpoint, one text: the same numbers, by another largest one.
    others, other_weights = opened(folders / "int8")
    for node, other in zip(attentions, others, strict=True):
        ours, theirs = weights.rows(node.input[14]), other_weights.rows(other.input[14])
        assert np.allclose(ours * LARGEST[kind], theirs * LARGEST["int8"], rtol=1e-6)


def test_given_scales_are_one_a_layer(folders):
    attentions, weights = opened(folders / "given")
    found = [[float(weights.rows(node.input[at])[0]) for at in (14, 15)] for node in attentions]
    assert found == [[0.5, 0.125], [0.25, 1]]
    assert all(granularity(node) == (b"PER_TENSOR", b"PER_TENSOR") for node in attentions)


def test_what_the_cache_keeps_is_rounded_in_the_reading_of_the_graph(folders):
    def logits(name):
        return interpreter.logits(folders / name / onnx_graph.GRAPH_FILE, IDS, onnx_graph.NAMES)

    exact, rounded = logits("float16")
    apart = {}
    for kind in (*LARGEST, "given"):
        found, found_rounded = logits(kind)
        # Before rounding the cache's type makes no difference.
        assert np.array_equal(found, exact)
        apart[kind] = np.linalg.norm(found_rounded - rounded) / np.linalg.norm(rounded)
    assert 0 < apart["int8"] < apart["float8e4m3fn"] < apart["int4"] < 0.5
    assert apart["int8"] < 0.03
    # Half of a step of 0.5 is far more than what was measured.
    assert apart["given"] > 3 * apart["int8"]


@pytest.mark.parametrize("shape", [(1,), (2, 1, 4)])
def test_numbers_are_kept_as_the_types_keep_them(shape):
    random = np.random.default_rng(3)
    values = random.normal(size=(5, 2, 4)) * 3
    scales = (random.uniform(0.01, 0.05, size=shape)).astype(np.float32)
    wide = scales.astype(np.float64).reshape(scales.size // shape[-1], shape[-1])
    expected = np.rint((values / wide).clip(-127, 127)) * wide
    assert np.allclose(paged_attention.stored(values, "int8", scales), expected)
    expected = (values / wide).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * wide
    assert np.allclose(paged_attention.stored(values, "float8e4m3fn", scales), expected)
    found = paged_attention.stored(values * 100, "int4", scales)
    assert np.allclose(np.abs(found / wide), 7)


def test_a_cache_without_scales_takes_none(folders, tmp_path):
    with pytest.raises(ExportError, match="a cache of float16 has no scales"):
        export(
            folders / "checkpoint",
            tmp_path / "out",
            "fp16",
            provider="cuda",
            kv_cache_scales=folders / "given.json",
        )
