"""Owns the known answer: ONNX Runtime's kernels give it, and none of the faults it is there for does."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from glm_export import cli
from glm_export.dev import tiny
from glm_export.error import ExportError
from glm_export.graph import interpreter
from glm_export.graph.onnx_graph import GRAPH_FILE, MICROSOFT, NAMES
from glm_export.models.family import CHATGLM3_SPECIALS
from glm_export.quantise.quantize import Scheme
from glm_export.verify import known_answer
from paged_session import Batch, PagedSession

PRECISIONS = ("fp32", "int8", "int4")
BLOCK_SIZE = 32
# Ids of the tiny checkpoint; the rows beyond are padding.
VOCAB_SIZE = tiny.NUM_PIECES + len(CHATGLM3_SPECIALS)


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory):
    folders = {precision: tmp_path_factory.mktemp("known") / precision for precision in PRECISIONS}
    for precision, folder in folders.items():
        # As ONNX Runtime multiplies: its kernels are what is compared with.
        kernel = None if precision == "fp32" else "ort"
        cli.export(tiny_checkpoint, folder, precision, kernel=kernel, quant_block_size=16)
    return folders


def read(folder):
    return json.loads((folder / known_answer.KNOWN_ANSWER_FILE).read_text())


def kernel_logits(folder, token_ids):
    blocks = [3, 1]
    session = PagedSession(folder, num_blocks=4)
    return session.run(Batch(BLOCK_SIZE).add(token_ids, 0, blocks, "all"))[:, :VOCAB_SIZE]


def error(known, logits, first=0):
    """As the engine measures it: root of the mean square, in deviations of a row."""
    errors = []
    for row in known["rows"][first:]:
        found = logits[row["position"]].astype(np.float64)
        found = (found - found.mean())[[index for index, _ in row["top"]]]
        expected = np.array([value for _, value in row["top"]]) - row["mean"]
        errors.append((found - expected) / row["deviation"])
    return float(np.sqrt(np.mean(np.square(errors))))


def test_a_long_prompt_is_compared_in_its_first_rows_and_beyond_the_block():
    rows = np.random.default_rng(0).standard_normal((264, 20))
    found = known_answer.describe(list(range(264)), rows, rows)
    compared = [*range(32), *range(256, 264)]
    assert [row["position"] for row in found["rows"]] == compared
    means = [round(float(rows[position].mean()), known_answer.DIGITS) for position in compared]
    assert [row["mean"] for row in found["rows"]] == means
    short = known_answer.describe(list(range(20)), rows[:20], rows[:20])
    assert [row["position"] for row in short["rows"]] == list(range(20))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_give_the_known_answer(exported, precision):
    known = read(exported[precision])
    assert len(known["token_ids"]) == len(known["rows"]) == BLOCK_SIZE + 8
    found = error(known, kernel_logits(exported[precision], known["token_ids"]))
    # The tolerance is a margin over what was expected, so neither vast nor missed by a little.
    assert found < 1e-4 if precision == "fp32" else 0.2 < found / known["tolerance"] < 0.6
    assert known["tolerance"] < 0.1


def swap_gate_and_up(graph):
    split = next(node for node in graph.node if node.op_type == "Split")
    split.output[0], split.output[1] = split.output[1], split.output[0]


def swap_cos_and_sin(graph):
    node = next(node for node in graph.node if node.op_type == "PagedAttention")
    node.input[8], node.input[9] = node.input[9], node.input[8]


def skip_an_addition(graph):
    norm = next((node for node in graph.node if node.op_type == "SkipSimplifiedLayerNormalization"), None)
    if norm is not None:
        norm.input[0] = norm.input[1]
        return
    # Inside one operator it cannot be skipped; what a layer adds can.
    first, second = (node for node in graph.node if node.op_type == "PostAttention")
    gathered = next(node for node in graph.node if second.input[1] in node.output)
    gathered.input[0] = first.input[1]


def rope_of_a_longer_context(graph):
    tables = {tensor.name: tensor for tensor in graph.initializer if tensor.name.startswith("rotary")}
    positions, width = tables["rotary.cos"].dims
    angles = np.outer(np.arange(positions), 500_000 ** -(np.arange(width) / width))
    for name, function in (("rotary.cos", np.cos), ("rotary.sin", np.sin)):
        tables[name].CopyFrom(numpy_helper.from_array(function(angles).astype(np.float32), name))


def scales_a_block_off(graph):
    """Only where there are scales; in float32 the weight's own columns."""
    name = next(name for name in ("layers.0.qkv.scales", "layers.0.qkv.weight") if name in names(graph))
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(tensor), 1, axis=1), name))


def names(graph):
    return {tensor.name for tensor in graph.initializer}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "fault",
    [swap_gate_and_up, swap_cos_and_sin, skip_an_addition, rope_of_a_longer_context, scales_a_block_off],
)
def test_a_fault_of_the_graph_is_seen(exported, tmp_path, precision, fault):
    known = read(exported[precision])
    shutil.copytree(exported[precision], tmp_path / "model")
    model = onnx.load(tmp_path / "model" / GRAPH_FILE)
    fault(model.graph)
    onnx.save(model, tmp_path / "model" / GRAPH_FILE)
    assert error(known, kernel_logits(tmp_path / "model", known["token_ids"])) > 2 * known["tolerance"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fault", ["none", "heads", "channels", "block"])
def test_a_fault_of_the_cache_is_seen(exported, precision, fault):
    """The prompt in two steps, its first block misplaced or turned between them."""
    known = read(exported[precision])
    token_ids = known["token_ids"]
    session = PagedSession(exported[precision], num_blocks=4)
    # What an earlier sequence left behind.
    session.run(Batch(BLOCK_SIZE).add(token_ids[::-1] * 3, 0, [0, 1, 2, 3]))
    session.run(Batch(BLOCK_SIZE).add(token_ids[:BLOCK_SIZE], 0, [2]))
    for name, cache in session.caches.items():
        turned = {
            "none": cache,
            "heads": cache[:, :, ::-1],
            "channels": cache.swapaxes(2, 3).reshape(cache.shape),
            "block": np.roll(cache, 1, axis=0),
        }
        session.caches[name] = np.ascontiguousarray(turned[fault])
    rest = session.run(Batch(BLOCK_SIZE).add(token_ids[BLOCK_SIZE:], BLOCK_SIZE, [2, 1], "all"))
    logits = np.concatenate([np.zeros((BLOCK_SIZE, rest.shape[1])), rest])[:, :VOCAB_SIZE]
    found = error(known, logits, first=BLOCK_SIZE)
    assert found < known["tolerance"] if fault == "none" else found > 2 * known["tolerance"]


# The kernel has no 8 bits with zero points that are not whole.
@pytest.mark.parametrize(
    ("bits", "zeros"), [(4, None), (4, np.uint8), (4, np.float32), (8, None), (8, np.uint8)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_products_are_those_of_the_kernel(tmp_path, bits, zeros, dtype):
    """Three blocks a row: zero points of 4 bits are padded to a byte."""
    random = np.random.default_rng(bits)
    width, num_rows, block_size = 48, 7, 16
    arrays = {
        "table": random.standard_normal((9, width)).astype(dtype),
        "packed": random.integers(0, 256, (num_rows, 3, block_size * bits // 8), dtype=np.uint8),
        "scales": random.random((num_rows, 3)).astype(dtype),
        "bias": random.standard_normal(num_rows).astype(dtype),
    }
    if zeros is np.uint8:
        arrays["zeros"] = random.integers(0, 256, (num_rows, (3 * bits + 7) // 8), dtype=np.uint8)
    elif zeros is not None:
        arrays["zeros"] = (random.random((num_rows, 3)) * 2**bits).astype(dtype)
    product = ["rows", "packed", "scales", "" if zeros is None else "zeros", "", "bias"]
    attributes = {"K": width, "N": num_rows, "bits": bits, "block_size": block_size}
    token_ids = helper.make_tensor_value_info("token_ids", TensorProto.INT32, ["n"])
    logits = helper.make_tensor_value_info("logits", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "token_ids"], ["rows"], axis=0),
            helper.make_node("MatMulNBits", product, ["logits"], domain=MICROSOFT, **attributes),
        ],
        "product",
        [token_ids],
        [logits],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=10), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"token_ids": np.array([3, 0, 8], np.int32)})
    exact, _ = interpreter.logits(tmp_path / "model.onnx", [3, 0, 8], NAMES)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(exact, expected, atol=largest * (1e-6 if dtype == np.float32 else 2e-3))


def test_quantised_weights_are_read_as_they_were_written(exported):
    """Not the interpreter's own idea of them: what the scheme itself makes of its arrays."""
    graph = onnx.load(exported["int4"] / GRAPH_FILE).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    parts = {part: tensors[f"lm_head.{part}"] for part in ("packed", "scales", "zeros")}
    weight = Scheme(4, 16).dequantize(parts)
    known = read(exported["int4"])
    exact, _ = interpreter.logits(exported["int4"] / GRAPH_FILE, known["token_ids"][:3], NAMES)
    # 512 logits of 64 values: the weight must span them.
    solution, *_ = np.linalg.lstsq(weight.astype(np.float64), exact.T)
    np.testing.assert_allclose(weight @ solution, exact.T, atol=1e-5)


def test_a_node_without_a_rule_is_named_whatever_the_graph_is_read_for(tmp_path):
    token_ids = helper.make_tensor_value_info("token_ids", TensorProto.INT32, ["n"])
    graph = helper.make_graph([helper.make_node("Neg", ["token_ids"], ["logits"])], "g", [token_ids], [])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"^the graph: no rule for the node Neg$"):
        interpreter.logits(tmp_path / "model.onnx", [3], NAMES)


def test_the_answer_is_of_real_ids_only(exported):
    known = read(exported["fp32"])
    assert all(index < VOCAB_SIZE for row in known["rows"] for index, _ in row["top"])
    assert all(np.all(np.diff([value for _, value in row["top"]]) <= 0) for row in known["rows"])


def test_a_checkpoint_that_overflows_is_refused(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["transformer.encoder.final_layernorm.weight"] *= np.float32(2e38)
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ExportError, match="activations overflow"):
        cli.export(tmp_path / "in", tmp_path / "out", "fp32")
    assert not (tmp_path / "out").exists()
