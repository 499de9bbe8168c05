"""The whole path in numbers: checkpoint, exporter, graph, engine, against transformers in fp32."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GLMSERVE


# What the engine sees differ: rotation of half a head, of divided positions, of whole heads; no bias.
@pytest.mark.parametrize("member", ["chatglm3-6b", "chatglm2-6b-32k", "glm-4-9b-chat", "glm-edge-4b-chat"])
def test_logits_equal_transformers(tmp_path, member):
    tiny = [sys.executable, "-m", "glm_export.dev.tiny", tmp_path / "checkpoint", "--seed", "1"]
    subprocess.run([*tiny, "--member", member], check=True)
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
