"""`make gpu-check`'s own steps on the CPU: all end to end, taken up where they were, and their verdict."""

import json
import subprocess
import sys

from conftest import GLMSERVE, ROOT

SMALL = ["--layers", "1", "--hidden-size", "256", "--prompt-tokens", "16", "--max-tokens", "4"]
SMALL += ["--rows", "1", "2", "--kv-cache-memory", "64"]


def gpu_check(work, *more):
    script = ROOT / "tests" / "bench" / "gpu_check.py"
    command = [sys.executable, script, "--work", work, "--provider", "cpu", "--glmserve", GLMSERVE]
    return subprocess.run([*command, *SMALL, *more], capture_output=True, text=True, timeout=400, check=False)


def test_every_step_runs_once_and_again_only_when_asked(tmp_path):
    first = gpu_check(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    results = json.loads((tmp_path / "state.json").read_text())["results"]
    assert {name.split("/")[0] for name in results} == {"reference", "numbers", "weights", "export", "speed"}
    exact = results["numbers/wide/fp32"]
    assert exact["same_greedy"] == "24/24"
    assert "200 tokens" in exact["prompt"]
    assert "140 tokens" in exact["decode"]
    assert all(results["speed/int4"][rows]["decode"] > 0 for rows in "12")
    assert results["speed/int4"]["1"]["spread"].endswith("%")
    # The first precision is whole before any other begins.
    names = list(results)
    assert names.index("speed/fp32") < names.index("numbers/small/int8")
    assert "| wide | fp32 | 200 tokens" in first.stdout
    again = gpu_check(tmp_path, "--redo", "speed/int8")
    assert [line.split(":")[0] for line in again.stdout.splitlines() if " s {" in line] == ["speed/int8"]
    other = gpu_check(tmp_path, "--layers", "2")
    assert other.returncode != 0
    assert "choose another --work" in other.stderr
    # A wrong number fails the check and leaves no result: the reference is another model's now.
    (tmp_path / "small" / "logits.npy").write_bytes((tmp_path / "wide" / "logits.npy").read_bytes())
    failed = gpu_check(tmp_path, "--redo", "numbers/small/fp32")
    assert failed.returncode != 0
    assert "numbers/small/fp32: FAILED" in failed.stdout
