"""The same bits on every processor: logits of whole models, by each instruction set that this one has."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import DEFAULT_MODEL, GLMSERVE

# AMX is not among them: attention has other bits there, unless --bit-exact says no to it.
LESSER_SETS = ("avx2", "avxvnni", "avx512")
# Beyond one key tile of attention, and no whole number of anything; fewer for the default model, of which
# portable code computes ten a second.
NUM_IDS = 141
NUM_IDS_OF_DEFAULT = 37
# Heads of 64 and 128 channels, more query heads than key heads, blocks from the smallest to the largest.
RANDOM = {
    "int4": ("--head-dim", "64", "--quant-block-size", "32"),
    "int8": ("--head-dim", "128", "--quant-block-size", "512"),
}


@pytest.fixture(scope="module", params=["default", *RANDOM])
def model(request, tmp_path_factory) -> Path:
    if request.param == "default":
        assert DEFAULT_MODEL.exists(), "the default model is missing: run `make model`"
        return DEFAULT_MODEL
    _, head_dim, *scheme = RANDOM[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    sizes = ["--head-dim", head_dim, "--hidden-size", "512", "--ffn-size", "1024", "--num-layers", "3"]
    subprocess.run([sys.executable, "-m", "glm_export.dev.tiny", folder / "checkpoint", *sizes], check=True)
    export = [Path(sys.executable).with_name("glm-export"), folder / "checkpoint", folder / "model"]
    subprocess.run([*export, "--precision", request.param, *scheme], check=True)
    return folder / "model"


def logits(model: Path, out: Path, simd: str, *options: str) -> bytes:
    """The file that `glmserve logits` writes, with the best instruction set if none is named."""
    num_ids = NUM_IDS_OF_DEFAULT if model == DEFAULT_MODEL else NUM_IDS
    ids = ",".join(str((7919 * i + 13) % 300) for i in range(num_ids))
    run = subprocess.run(
        [
            GLMSERVE,
            "logits",
            "--model",
            model,
            "--ids",
            ids,
            "--out",
            out,
            "--kv-cache-memory",
            "64",
            *options,
        ],
        env=os.environ | {"GLMSERVE_SIMD": simd},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if simd and "this CPU does not have" in run.stderr:
        pytest.skip(f"this CPU does not have {simd}")
    assert run.returncode == 0, run.stderr
    return out.read_bytes()


@pytest.fixture(scope="module")
def portable(model, tmp_path_factory) -> bytes:
    content = logits(model, tmp_path_factory.mktemp("logits") / "portable.npy", "portable")
    assert content
    return content


@pytest.mark.parametrize("simd", LESSER_SETS)
def test_logits_are_the_same_to_the_bit(model, portable, tmp_path, simd):
    found = logits(model, tmp_path / "logits.npy", simd)
    same = found == portable
    assert same, f"{simd}: {largest_difference(tmp_path / 'logits.npy', portable)}"


def test_bit_exact_leaves_the_best_set_the_same_bits(model, portable, tmp_path):
    # In other steps too, as a server would compute them.
    found = logits(model, tmp_path / "logits.npy", "", "--bit-exact", "--chunk", "7")
    same = found == portable
    assert same, largest_difference(tmp_path / "logits.npy", portable)


def test_bit_exact_is_refused_where_onnx_runtime_multiplies(tiny_model, tmp_path):
    run = subprocess.run(
        [GLMSERVE, "logits", "--model", tiny_model, "--ids", "1", "--out", tmp_path / "x.npy", "--bit-exact"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1 and "--bit-exact is for graphs" in run.stderr, run.stderr


def largest_difference(path: Path, content: bytes) -> str:
    other = path.with_name("portable.npy")
    other.write_bytes(content)
    found, want = np.load(path), np.load(other)
    return f"{np.mean(found != want):.1%} of the logits differ, by up to {np.abs(found - want).max()}"
