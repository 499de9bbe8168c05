"""Owns what tests share: tiny checkpoints, made once a session."""

import pytest

from glm_export.dev import tiny


def pytest_addoption(parser):
    """For the table that test_cuda.py compares with."""
    parser.addoption("--write-golden", action="store_true", help="write golden/cuda_kernels.json anew")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A tiny random checkpoint folder; read it, never write in it."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    tiny.write(folder)
    return folder
