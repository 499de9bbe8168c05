"""Owns numeric parity: the exported graph on ONNX Runtime's kernels against transformers' GlmForCausalLM."""

import itertools
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from glm_export.cli import DEFAULT_QUANT_BLOCK_SIZE, PRECISIONS, export
from glm_export.dev import tiny
from glm_export.error import ExportError
from glm_export.graph import onnx_graph
from glm_export.models import family
from glm_export.quantise.quantize import Scheme
from glm_export.read import config, weights
from glm_export.verify import check
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


@pytest.fixture(scope="module", params=tiny.MEMBERS)
def member(request, tmp_path_factory):
    """A checkpoint folder of each member."""
    pytest.importorskip("transformers", reason="the reference is transformers: pip install '.[check]'")
    folder = tmp_path_factory.mktemp("member") / request.param
    tiny.write(folder, seed=11, member=request.param)
    return folder


def test_every_member(member, tmp_path):
    export(member, tmp_path / "out", "fp32", block_size=BLOCK_SIZE)
    tokens = ids(60, 8)
    session = PagedSession(tmp_path / "out", 4)
    # A prompt, then token by token.
    rows = [session.run(Batch(BLOCK_SIZE).add(tokens[:50], 0, [2, 0, 3, 1], "all"))]
    for past in range(50, 60):
        rows.append(session.run(Batch(BLOCK_SIZE).add(tokens[past : past + 1], past, [2, 0, 3, 1], "all")))
    assert_close(np.concatenate(rows), check.reference_logits(member, tokens))


@pytest.mark.parametrize("name", [name for name in tiny.MEMBERS if name not in family.MEMBERS])
def test_transformers_reads_native_folders_alike(tmp_path, name):
    """Nothing of ours stands between the folder and this reference."""
    transformers = pytest.importorskip("transformers")
    import torch

    tiny.write(tmp_path / name, seed=12, member=name)
    model = transformers.GlmForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
    tokens = ids(40, 9)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    export(tmp_path / name, tmp_path / "out", "fp32", block_size=BLOCK_SIZE)
    found = PagedSession(tmp_path / "out", 4).run(Batch(BLOCK_SIZE).add(tokens, 0, [2, 0, 3], "all"))
    assert_close(found, expected)


def test_positions_of_chatglm2_32k_are_divided(tmp_path):
    tiny.write(tmp_path / "checkpoint", member="chatglm2-6b-32k")
    cos, sin = onnx_graph.rotary_tables(config.load(tmp_path / "checkpoint"))
    # The authors' line: seq_idx = arange(seq_len) / rope_ratio, with the base as it was.
    angles = np.outer(np.arange(512) / 16, 1 / 10_000 ** (np.arange(0, 8, 2) / 8))
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-5)


def test_rows_of_native_weights_come_in_any_chunks(tmp_path):
    tiny.write(tmp_path / "checkpoint", member="glm-4-9b-chat-hf")
    settings = config.load(tmp_path / "checkpoint")
    qkv = weights.open_checkpoint(settings, tmp_path / "checkpoint")[weights.layer(settings, 0)["qkv"].source]
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    expected = np.concatenate([stored[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert qkv.shape == expected.shape
    # 128 rows, of which 64 are queries: chunks that end inside a part, at its end and beyond the last row.
    for rows in (1, 7, 32, 64, 100, 1000):
        chunks = [qkv.rows(first, first + rows) for first in range(0, 128, rows)]
        np.testing.assert_array_equal(np.concatenate(chunks), expected)


def test_native_tensors_are_named_where_they_are_wrong(tmp_path):
    folder = tmp_path / "checkpoint"
    tiny.write(folder, member="glm-edge-1.5b-chat")
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.self_attn.k_proj.weight"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(
        ExportError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight is missing, .*32, 64"
    ):
        weights.open_checkpoint(config.load(folder), folder)
