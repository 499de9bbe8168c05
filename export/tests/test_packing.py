"""Owns the proof that packed weights lie as drawn and stand for what the checkpoint holds."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from safetensors.numpy import load_file

from glm_export import cli
from glm_export.error import ExportError
from glm_export.graph import fusion, interpreter
from glm_export.graph.fusion import OWN
from glm_export.graph.onnx_graph import GRAPH_FILE
from glm_export.graph.packing import Packing, pack

GOLDEN = Path(__file__).parent / "golden" / "packing.json"
CASES = [
    {"bits": bits, "block_size": block_size, "K": 256, "N": rows, "epilogue": epilogue}
    for bits, block_size, rows, epilogue in [
        (4, 32, 50, "none"),
        (4, 128, 70, "swiglu"),
        (4, 256, 33, "none"),
        (8, 64, 50, "swiglu"),
        (8, 128, 33, "none"),
        (8, 256, 50, "swiglu"),
    ]
]


def packed(case):
    """Codes and scales by a formula that the Rust test has too."""
    rows, width, bits = np.arange(case["N"]), case["K"], case["bits"]
    packing = Packing(bits, case["block_size"], case["N"], width, case["epilogue"] == "swiglu")
    codes = (5 * rows[:, None] + 3 * np.arange(width) + rows[:, None] * np.arange(width)) % (1 << bits)
    scales = 0x2000 + 16 * rows[:, None] + np.arange(width // case["block_size"])
    # In the panels' order, where -1 is a row that is not there.
    order = packing.vector(rows + 1).ravel() - 1
    codes = np.where(order[:, None] < 0, 1 << bits - 1, codes[order]).astype(np.uint8)
    scales = np.where(order[:, None] < 0, 0, scales[order]).astype("<u2").view("<f2")
    return pack(codes, scales, bits)


def test_packing_is_the_golden_one():
    """The Rust side packs the same matrices by its own reading of the drawing."""
    found = [case | {"sha256": hashlib.sha256(packed(case).tobytes()).hexdigest()} for case in CASES]
    if os.environ.get("GLM_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=2) + "\n")
    assert found == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_stand_for_the_checkpoint(tiny_checkpoint, tmp_path, bits):
    """By the known answer's reading of the graph, which shares no code with the writing of it."""
    cli.export(tiny_checkpoint, tmp_path / "out", f"int{bits}")
    model = onnx.load(tmp_path / "out" / GRAPH_FILE, load_external_data=False).graph
    nodes = list(fusion.expanded(model.node))
    products = {node.input[1]: node for node in nodes if node.op_type == "QuantizedMatMul"}
    assert len(products) == 2 * 4 + 1
    assert all(node.domain == OWN for node in products.values())
    assert not {"Split", "QuickGelu", "Mul", "MatMulNBits"} & {node.op_type for node in nodes}
    source = load_file(tiny_checkpoint / "model.safetensors")
    weights = interpreter.Weights.of_folder(tmp_path / "out", model.initializer)
    rows = np.random.default_rng(1).standard_normal((3, 64))
    layer = "transformer.encoder.layers.1."
    for name, tensor in [
        ("layers.1.qkv", "self_attention.query_key_value.weight"),
        ("layers.1.gate_up", "mlp.dense_h_to_4h.weight"),
    ]:
        node = products[f"{name}.weight"]
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        # Both halves alike: the second is what rounding to int8 makes of it.
        inputs = interpreter._Inputs(
            node, {node.input[0]: np.concatenate([rows, rows])}, weights, {}, [False, True]
        )
        exact, rounded = np.split(interpreter.NODES["QuantizedMatMul"](inputs, attributes)[0], 2)
        expected = rows @ source[layer + tensor].astype(np.float64).T
        if "qkv" in name:
            expected += source[layer + "self_attention.query_key_value.bias"]
        else:
            gate, up = np.split(expected, 2, axis=1)
            expected = gate / (1 + np.exp(-gate)) * up
        assert exact.shape == expected.shape
        error = np.linalg.norm(exact - expected) / np.linalg.norm(expected)
        assert 1e-4 < error < {4: 0.2, 8: 0.01}[bits]
        assert 1e-4 < np.linalg.norm(exact - rounded) / np.linalg.norm(exact) < 0.02


def test_onnx_runtimes_kernel_stays_selectable(tiny_checkpoint, tmp_path):
    cli.export(tiny_checkpoint, tmp_path / "out", "int4", kernel="ort")
    kinds = {node.op_type for node in onnx.load(tmp_path / "out" / GRAPH_FILE).graph.node}
    assert "MatMulNBits" in kinds
    assert "QuantizedMatMul" not in kinds
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["graph"]["kernel"] == "ort"


def test_what_the_kernel_has_not_is_refused_by_name(tiny_checkpoint, tmp_path):
    with pytest.raises(ExportError, match=r"rows of 64 values in blocks of 16; .*choose --kernel ort"):
        cli.export(tiny_checkpoint, tmp_path / "out", "int4", quant_block_size=16)
    with pytest.raises(ExportError, match="--quant-block-size 256: --kernel ort has up to 128"):
        cli.export(tiny_checkpoint, tmp_path / "out", "int8", kernel="ort", quant_block_size=256)
    with pytest.raises(ExportError, match="--kernel glmserve multiplies by weights of int8 or int4"):
        cli.export(tiny_checkpoint, tmp_path / "out", "fp32", kernel="glmserve")
    with pytest.raises(ExportError, match="--kernel glmserve multiplies by weights of int8 or int4"):
        cli.export(tiny_checkpoint, tmp_path / "out", "int4", provider="cuda", kernel="glmserve")


def test_a_scale_that_float16_cannot_hold_is_refused():
    class Huge:
        name = "huge"

        def rows(self, first, end):
            return np.full((end - first, 32), 1e7, np.float32)

    with pytest.raises(ExportError, match=r"huge: a scale of .* is beyond float16"):
        Packing(8, 32, 32, 32).panels(Huge(), 0, 1)
