"""Owns GPTQ and AWQ: what their formulas say of the codes is what the graph computes with, to the bit."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from glm_export import cli
from glm_export.error import ExportError
from glm_export.graph import interpreter
from glm_export.graph.onnx_graph import GRAPH_FILE, NAMES
from glm_export.quantise.quantize import Scheme
from paged_session import Batch, PagedSession

LAYER = "transformer.encoder.layers.0."
ROLES = {
    "self_attention.query_key_value": "qkv",
    "self_attention.dense": "dense",
    "mlp.dense_h_to_4h": "gate_up",
    "mlp.dense_4h_to_h": "down",
}
HEAD = "transformer.output_layer.weight"
IDS = [5, 300, 17, 17, 250, 9, 3, 400]
CASES = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "gptq_v2, ordered by activation": {
        **{"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
        "checkpoint_format": "gptq_v2",
    },
    "gptq, whole rows": {"bits": 4, "group_size": -1, "desc_act": False, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "awq, older names": {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True},
}


def words(codes, axis, columns=range(8)):
    """Eight codes an int32 along an axis, one at a time as the authors' packers do it."""
    codes = np.moveaxis(codes.astype(np.uint32), axis, 0)
    packed = np.zeros((len(codes) // 8, *codes.shape[1:]), np.uint32)
    for word in range(len(packed)):
        for place, column in enumerate(columns):
            packed[word] |= codes[8 * word + column] << np.uint32(4 * place)
    return np.moveaxis(packed, 0, axis).view(np.int32)


def quantised(shape, settings, generator):
    """Random parts of a matrix [N, K], and the weights that the method's formula makes of them."""
    num_rows, width = shape
    is_awq = settings.get("quant_method") == "awq" or "w_bit" in settings
    group_size = settings.get("group_size", settings.get("q_group_size"))
    group_size = width if group_size == -1 else group_size
    codes = generator.integers(0, 16, (width, num_rows))
    first_format = not is_awq and settings.get("checkpoint_format") != "gptq_v2"
    # The first format cannot store a zero point of 0.
    zeros = generator.integers(int(first_format), 16, (width // group_size, num_rows))
    scales = (generator.random((width // group_size, num_rows)) / 4 / np.sqrt(width) + 0.01).astype(
        np.float16
    )
    groups = np.arange(width) // group_size
    if settings.get("desc_act"):
        groups = generator.permutation(groups)
    weight = (codes - zeros[groups]).astype(np.float32) * scales[groups].astype(np.float32)
    columns = (0, 2, 4, 6, 1, 3, 5, 7) if is_awq else range(8)
    parts = {
        "qweight": words(codes, 1, columns) if is_awq else words(codes, 0),
        "qzeros": words(zeros - int(first_format), 1, columns),
        "scales": scales,
    }
    if not is_awq:
        parts["g_idx"] = groups.astype(np.int32)
    return {part: np.ascontiguousarray(array) for part, array in parts.items()}, weight.T


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def folders(request, tiny_checkpoint, tmp_path_factory):
    """A quantised checkpoint, and beside it the plain one that its formula means."""
    settings, generator = CASES[request.param], np.random.default_rng(3)
    root = tmp_path_factory.mktemp("prequantised")
    for name in ("quantised", "plain"):
        shutil.copytree(tiny_checkpoint, root / name)
    plain = load_file(tiny_checkpoint / "model.safetensors")
    # What the exporter rounds itself shall already lie on its grid.
    scheme = Scheme(4, 32)
    plain[HEAD] = scheme.dequantize(scheme.quantize(plain[HEAD]))
    tensors = dict(plain)
    for name in [name for name in plain if plain[name].ndim == 2 and "layers" in name]:
        parts, plain[name] = quantised(plain[name].shape, settings, generator)
        del tensors[name]
        base = name.removesuffix(".weight")
        tensors |= {f"{base}.{part}": array for part, array in parts.items()}
        if "query_key_value" not in name:
            tensors[f"{base}.bias"] = np.zeros(len(plain[name]), np.float16)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in plain.items()}, root / "plain/model.safetensors"
    )
    (root / "quantised/model.safetensors").unlink()
    if "quant_method" in settings:
        path = root / "quantised/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
        save_file(tensors, root / "quantised/model.safetensors")
    else:
        file = "quant_config.json" if "w_bit" in settings else "quantize_config.json"
        (root / "quantised" / file).write_text(json.dumps(settings))
        save_file(tensors, root / "quantised/gptq_model-4bit-128g.safetensors")
    cli.export(root / "quantised", root / "int4", "int4", kernel="ort")
    cli.export(root / "quantised", root / "fp32", "fp32")
    cli.export(root / "plain", root / "expected", "fp32")
    return root, plain


def tensors_of(folder):
    graph = onnx.load(folder / GRAPH_FILE).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def test_codes_are_what_the_formula_says(folders):
    root, plain = folders
    found = tensors_of(root / "int4")
    for module, role in ROLES.items():
        parts = {part: found[f"layers.0.{role}.{part}"] for part in ("packed", "scales", "zeros")}
        block_size = 2 * parts["packed"].shape[2]
        weight = Scheme(4, block_size).dequantize(parts)
        expected = plain[f"{LAYER}{module}.weight"]
        order = found.get(f"layers.0.{role}.order")
        np.testing.assert_array_equal(weight, expected if order is None else expected[:, order])


def test_float_export_is_the_same_network(folders):
    root, plain = folders
    found = tensors_of(root / "fp32")
    for module, role in ROLES.items():
        np.testing.assert_array_equal(found[f"layers.0.{role}.weight"], plain[f"{LAYER}{module}.weight"])


def test_logits_are_those_of_the_plain_weights(folders):
    root, _ = folders
    expected, _ = interpreter.logits(root / "expected" / GRAPH_FILE, IDS, NAMES)
    found, _ = interpreter.logits(root / "int4" / GRAPH_FILE, IDS, NAMES)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    # What is left is the head's second rounding.
    assert error < 0.005
    kernel = PagedSession(root / "int4", 2).run(Batch(32).add(IDS, 0, [1], "all"))
    error = np.linalg.norm(kernel - expected) / np.linalg.norm(expected)
    # Activations are rounded to 8 bits, by whole rows in one of the cases.
    assert error < 0.08


def test_int8_is_refused(folders, tmp_path):
    root, _ = folders
    with pytest.raises(ExportError, match="quantised to 4 bits already: choose --precision int4"):
        cli.export(root / "quantised", tmp_path / "out", "int8")


def altered(tiny_checkpoint, folder, settings, change=None):
    """One matrix of a checkpoint quantised, and something wrong with it."""
    shutil.copytree(tiny_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    base = f"{LAYER}self_attention.dense"
    parts, _ = quantised(tensors.pop(f"{base}.weight").shape, CASES["gptq"], np.random.default_rng(4))
    if change is not None:
        change(parts)
    save_file(
        tensors | {f"{base}.{part}": array for part, array in parts.items()}, folder / "model.safetensors"
    )
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return folder


def set_zero(parts):
    parts["qzeros"][0, 0] = -1


def uneven_groups(parts):
    parts["g_idx"][0] = 1


def flatten(parts):
    parts["scales"] = parts["scales"].ravel()


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"bits": 8}, None, "gptq of 8 bits"),
        ({"quant_method": "fp8"}, None, "quant_method 'fp8' is not supported"),
        ({"checkpoint_format": "marlin"}, None, "checkpoint_format 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, None, "version gemm with zero points, not gemv"),
        ({"group_size": 48}, None, "groups of 48 weights"),
        ({"group_size": "many"}, None, "config.json: group_size is 'many'"),
        ({}, set_zero, "a stored zero point of 15"),
        ({}, uneven_groups, "not every group has 32 weights"),
        ({}, flatten, r"dense.scales is F16 of shape \[128\], expected F16 or F32 of shape \[2, 64\]"),
        ({}, lambda parts: parts.pop("qzeros"), "dense.qzeros is missing"),
    ],
)
def test_what_cannot_be_taken_is_named(tiny_checkpoint, tmp_path, settings, change, message):
    folder = altered(tiny_checkpoint, tmp_path / "in", CASES["gptq"] | settings, change)
    with pytest.raises(ExportError, match=message):
        cli.export(folder, tmp_path / "out", "int4")


def test_codes_without_settings_and_settings_without_codes(tiny_checkpoint, tmp_path):
    folder = altered(tiny_checkpoint, tmp_path / "in", None)
    with pytest.raises(ExportError, match=r"neither config.json nor quantize_config.json"):
        cli.export(folder, tmp_path / "out", "int4")
    shutil.copytree(tiny_checkpoint, tmp_path / "plain")
    (tmp_path / "plain/quantize_config.json").write_text(json.dumps(CASES["gptq"]))
    with pytest.raises(ExportError, match="there is no qweight"):
        cli.export(tmp_path / "plain", tmp_path / "out", "int4")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"quantization_config": []}, "config.json: quantization_config is not an object"),
        ("quantize_config.json", [], "quantize_config.json: expected a JSON object"),
        ("quant_config.json", 4, "quant_config.json: expected a JSON object"),
    ],
)
def test_settings_of_another_shape_are_named(tiny_checkpoint, tmp_path, file, content, message):
    folder = altered(tiny_checkpoint, tmp_path / "in", CASES["gptq"])
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / file).write_text(json.dumps(config | content if file == "config.json" else content))
    with pytest.raises(ExportError, match=message):
        cli.export(folder, tmp_path / "out", "int4")


def test_the_manifest_says_whose_products_there_are(folders, tmp_path):
    """A server that promises the bits of its own kernels must not be told that there are no others."""
    root, _ = folders
    cli.export(root / "quantised", tmp_path / "out", "int4")
    kinds = {
        node.op_type for node in onnx.load(tmp_path / "out" / GRAPH_FILE, load_external_data=False).graph.node
    }
    assert {"MatMulNBits", "QuantizedMatMul"} <= kinds
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["graph"]["kernel"] == "ort"
