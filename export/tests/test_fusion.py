"""Owns the proof that fusing nodes changes none's meaning, and takes no others."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper

from glm_export import cli
from glm_export.graph import fusion, interpreter
from glm_export.graph.manifest import MANIFEST_FILE
from glm_export.graph.onnx_graph import GRAPH_FILE

IDS = [5, 17, 3, 99, 42]


@pytest.fixture
def unfused(tiny_checkpoint, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fusion, "fused", list)
        cli.export(tiny_checkpoint, tmp_path / "unfused", "int4")
    return tmp_path / "unfused"


def load(folder):
    return onnx.load(folder / GRAPH_FILE, load_external_data=False).graph


def test_a_fused_graph_reads_like_the_one_it_was_made_of(tiny_checkpoint, tmp_path, unfused):
    cli.export(tiny_checkpoint, tmp_path / "fused", "int4")
    before, after = (
        Counter(node.op_type for node in load(folder).node) for folder in (unfused, tmp_path / "fused")
    )
    # Of two layers; the first norm and product have no attention before them.
    assert (before["QuantizedMatMul"], before["SkipSimplifiedLayerNormalization"]) == (9, 4)
    # What is left to ONNX Runtime copies numbers and widens them, which is exact on any processor.
    assert after == {
        "Gather": 3,
        "Cast": 1,
        "QuantizedMatMul": 1,
        "PagedAttention": 2,
        "PostAttention": 2,
    }
    names = json.loads((unfused / MANIFEST_FILE).read_text())["graph"]["names"]
    for want, found in zip(
        interpreter.logits(unfused / GRAPH_FILE, IDS, names),
        interpreter.logits(tmp_path / "fused" / GRAPH_FILE, IDS, names),
        strict=True,
    ):
        np.testing.assert_array_equal(found, want)


def test_expansion_gives_the_nodes_back(unfused):
    nodes = list(load(unfused).node)
    again = list(fusion.expanded(fusion.fused(nodes)))
    assert len(again) == len(nodes)
    for node, found in zip(nodes, again, strict=True):
        assert (found.op_type, found.domain) == (node.op_type, node.domain)
        attributes = [
            {item.name: helper.get_attribute_value(item) for item in one.attribute} for one in (node, found)
        ]
        assert attributes[0] == attributes[1]
        # Weights keep their names.
        assert set(found.input) >= {name for name in node.input if name.endswith((".weight", ".bias"))}


def other_epsilon(dense, post_norm, gate_up, down, next_norm, following):
    next_norm.attribute[0].f *= 2


def other_bits(dense, post_norm, gate_up, down, next_norm, following):
    next(item for item in down.attribute if item.name == "bits").i = 8


def no_epilogue(dense, post_norm, gate_up, down, next_norm, following):
    next(item for item in gate_up.attribute if item.name == "epilogue").s = b"none"


def a_bias(dense, post_norm, gate_up, down, next_norm, following):
    down.input.append("bias")


def another_residual(dense, post_norm, gate_up, down, next_norm, following):
    next_norm.input[1] = post_norm.input[1]


@pytest.mark.parametrize("change", [other_epsilon, other_bits, no_epilogue, a_bias, another_residual])
def test_what_one_node_cannot_compute_is_left_alone(unfused, change):
    nodes = list(load(unfused).node)
    first = next(i for i, node in enumerate(nodes) if node.name == "layers.0.dense")
    change(*nodes[first : first + len(fusion.KINDS)])
    found = list(fusion.fused(nodes))
    # The norm before it is in the product by now.
    assert found[first - 1 :][: len(fusion.KINDS)] == nodes[first:][: len(fusion.KINDS)]
    assert sum(node.op_type == fusion.KIND for node in found) == 1


def test_a_norm_that_somebody_else_reads_stays_a_node(unfused):
    nodes = list(load(unfused).node)
    at = next(i for i, node in enumerate(nodes) if node.op_type == "SimplifiedLayerNormalization")
    nodes.append(helper.make_node("Identity", [nodes[at].output[0]], ["other"]))
    assert list(fusion.fused(nodes))[at : at + 2] == nodes[at : at + 2]
