"""An export that is killed, at whatever point, leaves nothing that `glmserve check` takes for a model."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from conftest import GLMSERVE
from glm_export import cli
from glm_export.dev import tiny

NUM_KILLS = 20
# Imports take longer than the export, and a kill among them would prove nothing.
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["glm_export.cli"])


def start(checkpoint, out, force):
    process = SPAWN.Process(target=cli.export, args=(checkpoint, out, "int4"), kwargs={"force": force})
    process.start()
    return process


def is_accepted(folder):
    done = subprocess.run([GLMSERVE, "check", folder], capture_output=True, text=True, timeout=120)
    return done.returncode == 0


@pytest.mark.parametrize("force", [False, True], ids=["new", "replacing"])
def test_a_killed_export_leaves_no_folder_that_looks_whole(tmp_path, force):
    seed = int(os.environ.get("GLM_KILL_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"GLM_KILL_SEED={seed}")
    generator = random.Random(seed)
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "exports" / "out"
    tiny.write(checkpoint)
    start(checkpoint, out, False).join()
    started = time.monotonic()
    start(checkpoint, out, True).join()
    duration = time.monotonic() - started
    assert is_accepted(out)
    whole = (out / "manifest.json").read_bytes()
    num_killed, num_refused = 0, 0
    while num_killed < NUM_KILLS:
        if not force:
            shutil.rmtree(out, ignore_errors=True)
        process = start(checkpoint, out, force)
        time.sleep(generator.uniform(0, duration))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            # It was quicker this time.
            assert process.exitcode == 0
            continue
        num_killed += 1
        for folder in out.parent.iterdir():
            if is_accepted(folder):
                # Whole to the byte: the folder from before, or one that lacked its new name only.
                assert (folder / "manifest.json").read_bytes() == whole
            else:
                num_refused += 1
                assert folder != out
    assert num_refused > NUM_KILLS // 4
    # The next export clears up.
    start(checkpoint, out, True).join()
    assert is_accepted(out)
    assert [folder.name for folder in out.parent.iterdir()] == ["out"]
