"""Owns what `--quality` finds: nothing in float32, more with fewer bits, and what the kernels show too."""

import numpy as np
import onnx
import pytest
from test_prequantised import CASES, altered

from glm_export import cli
from glm_export.dev import tiny
from glm_export.error import ExportError
from glm_export.graph.onnx_graph import GRAPH_FILE
from glm_export.verify import quality
from paged_session import Batch, PagedSession

BLOCK_SIZE = 32
KERNELS = ("ort", "glmserve")


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("quality")
    cli.export(tiny_checkpoint, root / "fp32", "fp32")
    for precision in ("int8", "int4"):
        for kernel in KERNELS:
            cli.export(tiny_checkpoint, root / f"{precision}-{kernel}", precision, kernel=kernel)
    return root


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, folders):
    return quality.Reference(tiny_checkpoint, folders / "fp32")


def test_float32_loses_nothing(folders, reference):
    found = reference.compare(folders / "fp32")
    assert found.num_tokens == 512
    assert list(found.weight_errors) == ["layers.0", "layers.1", "lm_head"]
    assert set(found.weight_errors.values()) == {0.0}
    assert 0 <= found.divergence < 1e-9
    assert found.agreement == 1
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)


@pytest.mark.parametrize(("kernel", "bound"), [("ort", 0.079), ("glmserve", 0.084)])
def test_fewer_bits_cost_more(folders, reference, kernel, bound):
    int8, int4 = (reference.compare(folders / f"{precision}-{kernel}") for precision in ("int8", "int4"))
    assert int8.weight_errors.keys() == int4.weight_errors.keys() == {"layers.0", "layers.1", "lm_head"}
    assert all(0.003 < error < 0.007 for error in int8.weight_errors.values())
    assert all(0.05 < error < bound for error in int4.weight_errors.values())
    assert 0 < int8.divergence < int4.divergence / 10
    assert int8.agreement > int4.agreement
    assert int4.num_bytes < int8.num_bytes


def test_gate_and_up_count_where_they_are_two_products(tmp_path):
    """As for CUDA: the same codes, and scales in half precision."""
    tiny.write(tmp_path / "checkpoint", tiny.Shape(head_dim=32))
    cli.export(tmp_path / "checkpoint", tmp_path / "fp32", "fp32")
    cli.export(tmp_path / "checkpoint", tmp_path / "cpu", "int8", kernel="ort")
    cli.export(tmp_path / "checkpoint", tmp_path / "cuda", "int8", provider="cuda")
    reference = quality.Reference(tmp_path / "checkpoint", tmp_path / "fp32")
    cpu, cuda = (reference.compare(tmp_path / provider).weight_errors for provider in ("cpu", "cuda"))
    assert cuda == pytest.approx(cpu, rel=1e-3)
    model = onnx.load(tmp_path / "cuda" / GRAPH_FILE, load_external_data=False)
    gate = next(node for node in model.graph.node if node.output[0] == "layers.1.gate")
    up = next(node for node in model.graph.node if node.output[0] == "layers.1.up")
    for i in (1, 2):
        up.input[i] = gate.input[i]
    onnx.save(model, tmp_path / "cuda" / GRAPH_FILE)
    with pytest.raises(ExportError, match=r"layers\.1\.gate_up: the exported graph has no such product"):
        reference.compare(tmp_path / "cuda")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_kernels_diverge_as_far(folders, reference, precision):
    """The interpreter's idea of their rounding is what the measure stands on."""
    folder = folders / f"{precision}-ort"
    found = reference.compare(folder).divergence
    blocks = list(range(len(reference.ids) // BLOCK_SIZE))
    session = PagedSession(folder, len(blocks))
    logits = session.run(Batch(BLOCK_SIZE).add(reference.ids, 0, blocks, "all"))[:-1, : reference.vocab_size]
    logits = logits.astype(np.float64)
    shares = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = reference.expected
    divergence = (np.exp(expected) * (expected - shares)).sum(axis=-1).mean()
    assert found == pytest.approx(divergence, rel=0.1)


def test_the_command_line_prints_it(tiny_checkpoint, tmp_path, capsys):
    arguments = [tiny_checkpoint, tmp_path / "out", "--precision", "int4", "--quality"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    text = capsys.readouterr().out
    assert "layers.1: relative error 0.0" in text
    assert "KL divergence 0.0" in text


def test_codes_that_were_taken_have_no_error(tiny_checkpoint, tmp_path):
    settings = CASES["gptq"] | {"checkpoint_format": "gptq_v2"}

    def shuffle(parts):
        parts["g_idx"] = np.random.default_rng(6).permutation(parts["g_idx"])

    folder = altered(tiny_checkpoint, tmp_path / "in", settings, shuffle)
    cli.export(folder, tmp_path / "out", "int4")
    found = quality.measure(folder, tmp_path / "out").weight_errors
    # One of its four matrices was taken, another layer has none.
    assert 0 < found["layers.0"] < found["layers.1"]
