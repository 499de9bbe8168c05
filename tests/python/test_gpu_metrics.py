"""What `/metrics` and the log say of a GPU, over the doubles of CUDA and of NVIDIA's management library.

Runs where CUDA_STUB and GLMSERVE_TEST_CUDA are set (`make test-cuda`).
"""

import os
import shutil
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import Server
from gpu_check import forget_known_answer

pytestmark = pytest.mark.skipif(
    not {"CUDA_STUB", "GLMSERVE_TEST_CUDA"} <= os.environ.keys(),
    reason="needs the GPU wheel, the CUDA double and its folders: make test-cuda",
)

EXPECTED = [
    'glmserve_gpu_info{name="CUDA stub",uuid="GPU-00000000-0000-0000-0000-000000000000"} 1',
    "glmserve_gpu_memory_used_bytes 10737418240",
    "glmserve_gpu_memory_total_bytes 85899345920",
    "glmserve_gpu_utilization_ratio 0.75",
    "glmserve_gpu_power_watts 412.5",
    "glmserve_gpu_temperature_celsius 61",
    "glmserve_gpu_sm_clock_hertz 1980000000",
    'glmserve_gpu_throttled{reason="hw_slowdown"} 0',
    'glmserve_gpu_throttled{reason="hw_thermal"} 1',
    'glmserve_gpu_throttled{reason="sw_power_cap"} 1',
    'glmserve_gpu_xid_errors_total{xid="79"} 1',
]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(Path(os.environ["GLMSERVE_TEST_CUDA"]) / "fp16", folder)
    forget_known_answer(folder)
    return folder


def lines(server):
    with urllib.request.urlopen(server.url + "/metrics", timeout=10) as answer:
        return answer.read().decode().splitlines()


def stop(server):
    server.process.kill()
    server.process.wait(30)


def test_what_the_driver_tells_is_in_the_metrics_and_the_log(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GLMSERVE_STUB_XID", "79")
    # The cache takes what is left of a GPU of this size.
    monkeypatch.setenv("GLMSERVE_STUB_MEMORY", str(2 << 30))
    server = Server(folder, tmp_path / "log", "--max-num-seqs", "2", "--threads", "1").wait_ready()
    try:
        deadline = time.monotonic() + 20
        while EXPECTED[-1] not in lines(server) and time.monotonic() < deadline:
            time.sleep(0.1)
        found = lines(server)
        assert [line for line in EXPECTED if line not in found] == []
        # What the device does not tell is not made up.
        assert "glmserve_gpu_uncorrected_ecc_errors 0" in found
    finally:
        stop(server)
    log = (tmp_path / "log").read_text()
    assert "the GPU is CUDA stub, GPU-00000000-0000-0000-0000-000000000000, compute capability" in log
    assert "the driver reported an error of the GPU" in log
    # 90 % of 2 GiB, less a margin of 256 MiB and what little the model takes.
    assert "kv_cache_mib=158" in log


def test_without_the_drivers_library_there_are_no_such_metrics(folder, tmp_path, monkeypatch):
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for library in Path(os.environ["CUDA_STUB"]).glob("*.so*"):
        if "nvidia-ml" not in library.name:
            (libraries / library.name).symlink_to(library)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(libraries))
    server = Server(folder, tmp_path / "log", "--kv-cache-memory", "64", "--threads", "1").wait_ready()
    try:
        time.sleep(0.5)
        assert not [line for line in lines(server) if "glmserve_gpu_" in line]
    finally:
        stop(server)
    assert "there are no metrics of the GPU" in (tmp_path / "log").read_text()
