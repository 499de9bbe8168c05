"""Owns the shards that a published checkpoint comes in, and that memory does not grow with them."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from glm_export.dev import full_size, tiny
from glm_export.read.checkpoint import Checkpoint

SMALL = tiny.Shape(seq_length=128, padded_vocab_size=2048)
# 24 million weights a layer, the largest 8 million: 17 MB as they lie in the file.
WIDE = tiny.Shape(
    num_layers=1,
    hidden_size=1024,
    num_attention_heads=8,
    head_dim=128,
    ffn_size=4096,
    seq_length=128,
    padded_vocab_size=8192,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    for file_format in ("safetensors", "bin"):
        full_size.write(root / file_format, file_format, SMALL)
    return root


def test_both_formats_hold_the_same(folders):
    found, other = Checkpoint(folders / "safetensors"), Checkpoint(folders / "bin")
    assert found.keys() == other.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.rows(), other[name].rows())
    rows = found["transformer.output_layer.weight"].rows()
    assert abs(rows.std() * np.sqrt(rows.shape[1]) - 1) < 0.01


@pytest.mark.parametrize(
    ("file_format", "index"),
    [("safetensors", "model.safetensors.index.json"), ("bin", "pytorch_model.bin.index.json")],
)
def test_the_index_lists_every_file(folders, file_format, index):
    content = json.loads((folders / file_format / index).read_text())
    files = {path.name for path in (folders / file_format).glob(f"*-of-*.{file_format}")}
    assert set(content["weight_map"].values()) == files
    assert len(files) > 2
    assert content["metadata"]["total_size"] < sum(
        (folders / file_format / name).stat().st_size for name in files
    )


def test_torch_reads_what_was_written_without_it(folders):
    torch = pytest.importorskip("torch", reason="the reader is torch: pip install '.[check]'")
    found = Checkpoint(folders / "bin")
    names = set()
    for path in (folders / "bin").glob("*.bin"):
        for name, tensor in torch.load(path, weights_only=True).items():
            assert tensor.dtype == torch.float16
            np.testing.assert_array_equal(tensor.float().numpy(), found[name].rows())
            names.add(name)
    assert names == set(found)


PROGRAM = """
import re, sys
from pathlib import Path
from glm_export import cli
assert cli.main() == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak_bytes(*arguments):
    """Peak resident memory of an export, as a process of its own sees it: rusage would count its parent's."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) * 1024


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    deep_shape = dataclasses.replace(WIDE, num_layers=4)
    cases = {
        "small": (SMALL, "safetensors"),
        "wide": (WIDE, "safetensors"),
        "deep": (deep_shape, "safetensors"),
        "deep, torch": (deep_shape, "bin"),
    }
    peaks = {}
    for name, (shape, file_format) in cases.items():
        full_size.write(tmp_path / name / "in", file_format, shape)
        peaks[name] = peak_bytes(tmp_path / name / "in", tmp_path / name / "out", "--precision", "int4")
    largest = 2 * 2 * WIDE.ffn_size * WIDE.hidden_size
    print(f"largest tensor {largest}, peaks {peaks}")
    assert sum(path.stat().st_size for path in (tmp_path / "deep" / "in").iterdir()) > 9 * largest
    assert peaks["wide"] - peaks["small"] < 2 * largest
    # The other three layers are more than six times the largest tensor, in the file as in memory.
    assert peaks["deep"] - peaks["wide"] < 2 * largest
    assert peaks["deep, torch"] - peaks["wide"] < 2 * largest
