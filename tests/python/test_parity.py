"""The whole path in numbers: checkpoint, exporter, graph, engine, against transformers in fp32."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GLMSERVE


@pytest.mark.parametrize("seed", [1, 2])
def test_logits_equal_transformers(tmp_path, seed):
    run = [sys.executable, "-m"]
    subprocess.run([*run, "glm_export.tiny", tmp_path / "checkpoint", "--seed", str(seed)], check=True)
    export = [
        Path(sys.executable).with_name("glm-export"),
        tmp_path / "checkpoint",
        tmp_path / "model",
        "--precision",
        "fp32",
    ]
    result = subprocess.run(
        [*export, "--check", "--glmserve", GLMSERVE], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
