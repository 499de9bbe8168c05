"""Owns numeric parity: the exported graph on ONNX Runtime's kernels against transformers' GlmForCausalLM."""

import itertools
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from glm_export import check, tiny
from glm_export.cli import DEFAULT_QUANT_BLOCK_SIZE, PRECISIONS, export
from glm_export.quantize import Scheme
from paged_session import Batch, PagedSession

BLOCK_SIZE = 16
SHAPES = {
    "default": tiny.Shape(),
    "one group, wide heads, long rope": tiny.Shape(
        num_layers=1, hidden_size=96, num_kv_heads=1, head_dim=32, ffn_size=160, rope_ratio=50.0
    ),
    "group a head": tiny.Shape(num_layers=3, num_attention_heads=3, num_kv_heads=3, head_dim=16, ffn_size=48),
}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def model(request, tmp_path_factory):
    """An exported fp32 folder, and the reference's logits by ids."""
    pytest.importorskip("transformers", reason="the reference is transformers: pip install '.[check]'")
    import torch

    folder = tmp_path_factory.mktemp("parity")
    tiny.write(folder / "checkpoint", SHAPES[request.param], seed=7)
    export(folder / "checkpoint", folder / "out", "fp32", block_size=BLOCK_SIZE)
    reference = check.reference_model(folder / "checkpoint")

    def logits(ids):
        with torch.no_grad():
            return reference(torch.tensor([ids])).logits[0].numpy()

    return folder / "out", logits


def ids(count, seed):
    return np.random.default_rng(seed).integers(0, 480, count).tolist()


def assert_close(found, expected):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_prefill_of_one_sequence(model):
    folder, reference = model
    tokens = ids(45, 1)
    found = PagedSession(folder, 4).run(Batch(BLOCK_SIZE).add(tokens, 0, [2, 0, 3], "all"))
    assert_close(found, reference(tokens))


def test_chunks_and_decode_equal_one_pass(model):
    folder, reference = model
    tokens, blocks = ids(40, 2), [3, 1, 0]
    session = PagedSession(folder, 4)
    cuts = [0, 7, 16, 17, 35, *range(36, 41)]
    rows = [
        session.run(Batch(BLOCK_SIZE).add(tokens[start:stop], start, blocks, "all"))
        for start, stop in itertools.pairwise(cuts)
    ]
    assert_close(np.concatenate(rows), reference(tokens))


def test_mixed_batch_over_shuffled_blocks(model):
    folder, reference = model
    first, second, third = ids(33, 3), ids(18, 4), ids(5, 5)
    session = PagedSession(folder, 8)
    # The first has all but its last token cached, the second is halfway through its prompt.
    assert session.run(
        Batch(BLOCK_SIZE).add(first[:32], 0, [6, 1], "none").add(second[:9], 0, [4], "none")
    ).shape == (0, len(reference(third)[0]))
    found = session.run(
        Batch(BLOCK_SIZE).add(first[32:], 32, [6, 1, 7]).add(second[9:], 9, [4, 0]).add(third, 0, [2], "all")
    )
    assert_close(found, np.concatenate([reference(first)[-1:], reference(second)[-1:], reference(third)]))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_graph_computes_with_the_rounded_weights(model, tmp_path, precision):
    folder, _ = model
    source = folder.parent / "checkpoint"
    export(source, tmp_path / "out", precision, kernel="ort", block_size=BLOCK_SIZE)
    tokens = ids(20, 6)
    found = PagedSession(tmp_path / "out", 2).run(Batch(BLOCK_SIZE).add(tokens, 0, [1, 0], "all"))
    # What is left when both have the same weights is the kernel's rounding of activations to 8 bits.
    expected = check.reference_logits(rounded(source, tmp_path / "rounded", PRECISIONS[precision]), tokens)
    assert np.linalg.norm(found - expected) < 0.04 * np.linalg.norm(expected)


def rounded(source, out, bits):
    """A copy of a checkpoint with its matrices quantised and dequantised."""
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    for name, array in tensors.items():
        if array.ndim == 2 and "embedding" not in name:
            scheme = Scheme(bits, DEFAULT_QUANT_BLOCK_SIZE).fitted(name, array.shape[1])
            tensors[name] = scheme.dequantize(scheme.quantize(array))
    save_file(tensors, out / "model.safetensors")
    return out


def test_quantised_graph_takes_no_wanted_row(model, tmp_path):
    folder, _ = model
    for precision in ("int8", "int4"):
        out = tmp_path / precision
        export(folder.parent / "checkpoint", out, precision, kernel="ort", block_size=BLOCK_SIZE)
        found = PagedSession(tmp_path / precision, 2).run(Batch(BLOCK_SIZE).add([5, 6], 0, [1], "none"))
        assert found.shape[0] == 0
