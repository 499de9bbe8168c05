"""Owns the proof, on the CPU, that candidates are the best of each row, however the row is searched."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from glm_export.graph import candidates, interface, target
from glm_export.graph.nodes import Nodes
from glm_export.graph.onnx_graph import IR_VERSION, OPSET
from glm_export.read.config import Geometry

# Vocabularies of ChatGLM3, GLM-4, GLM-Edge, one with no divisor that will do, and a short one.
SIZES = {"chatglm3": (64798, 65024), "glm-4": (151343, 151552), "glm-edge": (59256, 59264)} | {
    "prime": (9973, 9973),
    "short": (489, 512),
}
PARTS = {"chatglm3": 2032, "glm-4": 2368, "glm-edge": 1852, "prime": None, "short": None}


def geometry(name):
    vocab_size, padded = SIZES[name]
    return Geometry(1, 64, 4, 2, 16, 16, padded, vocab_size, 512)


def session(sizes, tmp_path):
    nodes = Nodes("data")
    candidates.add(nodes, sizes, "logits")
    made_for = target.choose("fp16", "cuda")
    logits, *outputs = interface.outputs(sizes, made_for)
    graph = helper.make_graph(nodes.nodes, "candidates", [logits], outputs, nodes.data.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    nodes.data.write(tmp_path)
    onnx.save(model, tmp_path / "model.onnx")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(tmp_path / "model.onnx", settings)


def rows(sizes):
    """Of every kind: flat and sharp, the best in one part, at its ends and in the padding, equal ones."""
    random = np.random.default_rng(7)
    width = sizes.padded_vocab_size
    found = random.normal(size=(8, width)).astype(np.float32)
    found[1] *= 30
    found[2, :100] += 50
    found[3, [0, sizes.vocab_size - 1]] = 90
    found[4] = 0.25
    found[5, sizes.vocab_size :] = 1e4
    found[6, [end + at for end in range(0, sizes.vocab_size - 1, 463) for at in (0, 1)]] += 70
    found[7] = -np.inf
    found[7, [3, sizes.vocab_size - 1]] = [1, 2]
    return found


@pytest.mark.parametrize("name", SIZES)
def test_candidates_are_the_best_of_each_row(name, tmp_path):
    sizes = geometry(name)
    logits = rows(sizes)
    ids, values, logsumexp = session(sizes, tmp_path).run(None, {"logits": logits})
    real = logits[:, : sizes.vocab_size]
    best = np.sort(real, axis=1)[:, ::-1][:, : interface.TOP_K]
    assert ids.dtype == np.int32
    assert np.array_equal(values, best)
    assert all(len(set(row)) == interface.TOP_K for row in ids)
    assert ids.min() >= 0
    # Row 7 has fewer than wanted, and what stands for the others must not be an id that there is not.
    finite = np.isfinite(values)
    assert ids[finite].max() < sizes.vocab_size
    assert np.array_equal(np.take_along_axis(logits, ids, axis=1)[finite], values[finite])
    with np.errstate(divide="ignore"):
        wide = np.where(np.isfinite(real), real, -np.inf).astype(np.float64)
        top = wide.max(axis=1, keepdims=True)
        expected = np.log(np.exp(wide - top).sum(axis=1, keepdims=True)) + top
    assert np.allclose(logsumexp, expected, rtol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_a_row_that_is_not_finite_shows(name, tmp_path):
    sizes = geometry(name)
    logits = rows(sizes)[:1]
    logits[0, 77] = np.nan
    _, _, logsumexp = session(sizes, tmp_path).run(None, {"logits": logits})
    assert np.isnan(logsumexp).all()


@pytest.mark.parametrize(("name", "width"), PARTS.items())
def test_long_rows_are_searched_in_parts(name, width, tmp_path):
    sizes = geometry(name)
    assert candidates.part_width(sizes.padded_vocab_size, interface.TOP_K) == width
    nodes = Nodes("data")
    candidates.add(nodes, sizes, "logits")
    assert sum(node.op_type == "TopK" for node in nodes.nodes) == (1 if width is None else 2)
    assert all(value.data_type in (TensorProto.INT64, TensorProto.FLOAT) for value in nodes.data.initializers)
