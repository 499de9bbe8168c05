"""Owns the proof that weights of 8-bit floats are rounded well and read as ONNX Runtime reads them."""

import ml_dtypes
import numpy as np
import onnx
import pytest

from glm_export.cli import export
from glm_export.dev import tiny
from glm_export.error import ExportError
from glm_export.graph import interpreter, onnx_graph
from glm_export.graph.initializers import Weights
from glm_export.graph.product_weights import weight_rows
from glm_export.quantise.fp8 import BLOCK_SIZE, LARGEST, Fp8Scheme


def dequantised(arrays, width):
    """By the operator's documentation: code times the scale of its block of a row."""
    codes, scales = arrays["codes"].astype(np.float64), arrays["block_scales"].astype(np.float64)
    return np.stack([codes[:, column] * scales[:, column // BLOCK_SIZE] for column in range(width)], axis=1)


@pytest.mark.parametrize("width", [128, 256, 200, 64])
def test_weights_are_rounded_to_the_nearest_float(width):
    random = np.random.default_rng(1)
    rows = random.normal(size=(16, width)).astype(np.float32) * np.logspace(-3, 2, 16)[:, None].astype("f4")
    rows[3] = 0
    arrays = Fp8Scheme().quantize(rows)
    shapes = {name: array.shape for name, array in arrays.items()}
    assert shapes == Fp8Scheme().shapes(16, width)
    assert {name: array.dtype for name, array in arrays.items()} == Fp8Scheme().dtypes()
    assert np.isfinite(arrays["codes"].astype(np.float32)).all()
    found = dequantised(arrays, width)
    assert not found[3].any()
    # Three bits of mantissa, or the spacing of what is too small for the exponent.
    scales = arrays["block_scales"].repeat(BLOCK_SIZE, axis=1)[:, :width]
    spacing = np.maximum(np.abs(rows) / 16, scales * 2.0**-10)
    assert (np.abs(found - rows) <= spacing * 1.001).all()
    # The largest of a block is the largest code.
    assert np.abs(arrays["codes"].astype(np.float32)).max(axis=1)[0] == LARGEST
    nearest = (rows / scales).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(nearest.view(np.uint8), arrays["codes"].view(np.uint8))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint whose rows are no multiple of a block, in 8-bit floats and in half precision."""
    folder = tmp_path_factory.mktemp("fp8")
    tiny.write(folder / "checkpoint", tiny.Shape(hidden_size=192, head_dim=32, ffn_size=320))
    for precision in ("fp8", "fp16"):
        export(folder / "checkpoint", folder / precision, precision, provider="cuda")
    return folder


def products(folder):
    graph = onnx.load(folder / onnx_graph.GRAPH_FILE, load_external_data=False).graph
    weights = Weights.of_folder(folder, graph.initializer)
    return {node.name: (node, weight_rows(node, weights), weights) for node in graph.node}


def test_every_product_is_of_8_bit_floats_and_has_its_bias(exported):
    fp8, fp16 = products(exported / "fp8"), products(exported / "fp16")
    assert list(fp8) == list(fp16)
    for name, (node, read, weights) in fp16.items():
        other, read_other, _ = fp8[name]
        if node.op_type != "Gemm":
            assert other.op_type == node.op_type
            continue
        assert other.op_type == "MatMulBlockQuantizedFp8Weight"
        assert (len(other.input) == 5) == (len(node.input) == 3) == name.endswith("qkv")
        num_rows = weights.shape(node.input[1])[0]
        rows, rounded = read(0, num_rows), read_other(0, num_rows)
        assert 0.01 < np.linalg.norm(rounded - rows) / np.linalg.norm(rows) < 0.03


def test_the_reading_of_the_graph_follows_the_weights(exported):
    ids = [5, 80, 33, 7, 120, 64]
    (fp8, _), (fp16, _) = (
        interpreter.logits(exported / precision / onnx_graph.GRAPH_FILE, ids, onnx_graph.NAMES)
        for precision in ("fp8", "fp16")
    )
    apart = np.linalg.norm(fp8 - fp16) / np.linalg.norm(fp16)
    assert 0 < apart < 0.1


def test_the_cpu_is_told_what_to_use_instead(tiny_checkpoint, tmp_path):
    with pytest.raises(ExportError, match=r"--precision fp8 is for --provider cuda.*int8"):
        export(tiny_checkpoint, tmp_path / "out", "fp8")
