"""OpenAI's own clients across silences that heartbeats fill; `make test-clients` runs all the others."""

import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from clients import catalogue, runs
from clients.environments import HERE, Installed

NODE = ROOT / ".tools" / "node"
# Several heartbeats in each silence, in a fraction of the time that the defaults take.
PACE = runs.Pace(silence_s=1.0, heartbeat_s=0.2)
CLIENTS = {client.name: client for client in catalogue.CLIENTS}


def _installed(name: str) -> Installed:
    program = CLIENTS[name].program
    if CLIENTS[name].language == "python":
        return Installed(
            (sys.executable, str(HERE / "python" / "run.py"), str(HERE / "python" / program)), ""
        )
    # Node looks for packages beside the program.
    for file in (HERE / "node").glob("*.mjs"):
        (NODE / file.name).write_text(file.read_text())
    node = subprocess.run([ROOT / "tests" / "tools" / "node.sh"], check=True, capture_output=True, text=True)
    return Installed((node.stdout.strip(), str(NODE / "run.mjs"), str(NODE / program)), "")


@pytest.mark.parametrize(
    ("name", "ability"),
    [(name, ability) for name in ("openai-python", "openai-node") for ability in CLIENTS[name].abilities],
)
def test_an_official_client_works_unchanged(name, ability, tmp_path):
    result = runs.run(CLIENTS[name], ability, _installed(name), tmp_path, PACE)
    assert result.ok, result.detail
