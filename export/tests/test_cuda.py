"""Owns the proof, without a GPU, that ONNX Runtime's CUDA provider takes the exported graphs whole, and with
which kernels.

Runs where the variable CUDA_STUB is set, on the GPU wheel over the test double of the CUDA libraries (`make
test-cuda`). Numbers mean nothing there; placement, kernel choice and input checks are the real library's.
`pytest tests/test_cuda.py --write-golden` writes the table of kernels anew.
"""

import ctypes
import json
import os
from pathlib import Path

import onnx
import pytest

import cuda_folders
import cuda_log
from cuda_folders import GRAPHS
from cuda_session import OPTIONS, CudaSession, open_session
from paged_session import Batch

pytestmark = pytest.mark.skipif(
    "CUDA_STUB" not in os.environ, reason="needs the GPU wheel and the CUDA double: make test-cuda"
)

BLOCK_SIZE = 128
CAPTURING = OPTIONS | {"enable_cuda_graph": "1"}
CAPABILITIES = ["7.5", "8.0", "8.9", "9.0"]
KERNELS = Path(__file__).parent / "golden" / "cuda_kernels.json"


def steps():
    """One of every kind; contexts cross a block's border, rows are few and many."""
    many = Batch(BLOCK_SIZE)
    for sequence in range(40):
        many.add([sequence], 130, [1, 2])
    return {
        "decode": Batch(BLOCK_SIZE).add([5], 140, [1, 3]),
        "decode of 40": many,
        "prefill": Batch(BLOCK_SIZE).add(list(range(200)), 0, [2, 5]),
        "chunk": Batch(BLOCK_SIZE).add(list(range(100)), 100, [2, 5]),
        "chunk without a wanted row": Batch(BLOCK_SIZE).add([1, 2, 3], 0, [2], "none"),
        "mixed": Batch(BLOCK_SIZE).add([1, 2, 3], 0, [2]).add([5], 140, [1, 3]).add([6, 7], 126, [4, 5]),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every kind of graph, at ChatGLM3's width of heads."""
    return cuda_folders.write(tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("name", GRAPHS)
def test_every_node_runs_on_cuda_for_every_kind_of_step(folders, tmp_path, monkeypatch, name, capsys):
    counts = {}
    for capability in CAPABILITIES:
        monkeypatch.setenv("GLMSERVE_STUB_CAPABILITY", capability)
        session = CudaSession(folders / name, 8, profile=tmp_path / capability)
        if capability == "7.5" and "bf16" in name:
            # Turing has no bfloat16; export/README.md says so.
            with pytest.raises(RuntimeError, match=r"bf16 sm>=80|BFloat16 MatMulNBits is not supported"):
                session.run(steps()["prefill"])
            continue
        for kind, batch in steps().items():
            found = session.run(batch)
            assert found["logits"].shape[0] == len(batch.wanted), kind
        counts[capability] = session.placement()
    providers = {provider for count in counts.values() for provider, _ in count}
    assert providers == {"CUDAExecutionProvider"}
    operators = {operator for count in counts.values() for _, operator in count}
    assert "PagedAttention" in operators
    assert not {operator for operator in operators if operator.startswith("Memcpy")}
    nodes = len(onnx.load(folders / name / "model.onnx", load_external_data=False).graph.node)
    total = sum(count.total() for count in counts.values())
    # Nothing was fused, copied between devices or left out: each node ran in each step.
    assert total == nodes * len(steps()) * len(counts)
    with capsys.disabled():
        print(f"\n{name}: {nodes} nodes, run on {providers}: {total} times at {', '.join(counts)}; {OPTIONS}")


def kernels(folder, tmp_path, monkeypatch):
    """What each kind of step launches: the number of all, and one layer's in order; capabilities that agree
    together.
    """
    table = {}
    for capability in CAPABILITIES:
        if capability == "7.5" and "bf16" in folder.name:
            continue
        monkeypatch.setenv("GLMSERVE_STUB_CAPABILITY", capability)
        session = CudaSession(folder, 8)
        for kind, batch in steps().items():
            # What a kind of step does at its first time only is not of interest.
            session.run(batch)
            with cuda_log.recorded(monkeypatch, tmp_path / "log") as calls:
                session.run(batch)
            names = cuda_log.launches(calls)
            row = f"{len(names)} launches; a layer: {' '.join(cuda_log.one_layer(names))}"
            if kind == "decode of 40":
                row += f"; the head: {' '.join(cuda_log.head(names))}"
            table.setdefault((kind, row), []).append(capability)
    return {f"{kind} at {', '.join(found)}": row for (kind, row), found in table.items()}


@pytest.mark.parametrize("name", GRAPHS)
def test_steps_launch_the_kernels_of_the_table(folders, tmp_path, monkeypatch, request, name):
    found = kernels(folders / name, tmp_path, monkeypatch)
    golden = json.loads(KERNELS.read_text()) if KERNELS.exists() else {}
    if request.config.getoption("--write-golden"):
        KERNELS.write_text(json.dumps(golden | {name: found}, indent=1) + "\n")
        pytest.skip("the table was written")
    assert found == golden.get(name)


def test_what_the_table_must_not_have():
    """Half-precision weights are never converted, and quantised ones not for a few rows."""
    rows = [
        (graph, kind, row)
        for graph, table in json.loads(KERNELS.read_text()).items()
        for kind, row in table.items()
    ]
    assert len(rows) > 6 * len(GRAPHS) - 1
    for graph, kind, row in rows:
        few = kind.startswith(("decode at", "mixed")) and not graph.startswith("int8")
        if not graph.startswith(("int", "fp8")) or few:
            assert "Dequantize" not in row, (graph, kind)
        if kind.startswith("decode") and "kv" not in graph:
            assert "GatherAndExpand" not in row, (graph, kind)
        if graph == "fp16-vocabulary" and kind.startswith("decode of 40"):
            # Parts of a row at once, and the best of them.
            assert row.count("RadixTopK") == 2, (graph, kind)


def test_an_empty_step_is_legal(folders):
    feeds = Batch(BLOCK_SIZE).add([], 5, [1], "none")
    session = CudaSession(folders / "fp16", 8)
    assert session.run(feeds)["logits"].shape[0] == 0


def test_a_memory_limit_and_another_arena_are_accepted(folders):
    options = OPTIONS | {"gpu_mem_limit": str(1 << 30)}
    session = CudaSession(folders / "int4-fp16", 8, options)
    found = session.session.get_provider_options()["CUDAExecutionProvider"]
    assert {key: found[key] for key in options} == options


def test_a_node_without_a_cuda_kernel_is_refused(folders):
    """The negative control: without it a session that quietly used the CPU would pass everything above."""
    with pytest.raises(Exception, match="fallback to CPU EP has been explicitly disabled"):
        open_session(folders / cuda_folders.NEGATIVE_CONTROL / "model.onnx")


def test_a_decode_can_be_captured(folders, monkeypatch):
    """What CUDA graphs ask of a graph; engine/tests/cuda.rs proves what the engine makes of it."""
    session = CudaSession(folders / "fp16", 8, CAPTURING)
    session.run_at_fixed_addresses(steps()["decode of 40"], 3)
    # From here on a step is one launch of what was captured.
    monkeypatch.setenv("GLMSERVE_STUB_FAIL", "graph")
    with pytest.raises(RuntimeError, match=r"cudaGraphLaunch|CUDA"):
        session.run_at_fixed_addresses(steps()["decode of 40"], 1)


def test_a_capture_forbids_what_cuda_forbids():
    """The double itself: were it lenient, a step that waits or takes memory would be captured."""
    runtime = ctypes.CDLL(str(Path(os.environ["CUDA_STUB"]) / "libcudart.so.13"))
    graph = ctypes.c_void_p()
    for forbidden in (
        lambda: runtime.cudaStreamSynchronize(None),
        lambda: runtime.cudaMalloc(ctypes.byref(ctypes.c_void_p()), 16),
        lambda: runtime.cudaMemcpy(bytes(4), bytes(4), 4, 1),
    ):
        assert forbidden() == 0
        assert runtime.cudaStreamBeginCapture(None, 0) == 0
        assert forbidden() == 900
        assert runtime.cudaStreamEndCapture(None, ctypes.byref(graph)) == 901
    assert runtime.cudaStreamBeginCapture(None, 0) == 0
    assert runtime.cudaStreamEndCapture(None, ctypes.byref(graph)) == 0


def test_a_graph_with_a_node_on_the_cpu_is_not_captured(folders):
    """The negative control, with the fallback that the engine forbids."""
    with pytest.raises(Exception, match="nodes have not been partitioned to the CUDAExecutionProvider"):
        open_session(folders / cuda_folders.NEGATIVE_CONTROL / "model.onnx", CAPTURING, fallback=True)


@pytest.mark.parametrize(("fault", "words"), [("launch", "CUDA"), ("memory", "memory|allocate")])
def test_faults_of_the_device_are_errors(folders, monkeypatch, fault, words):
    monkeypatch.setenv("GLMSERVE_STUB_MEMORY", str(1 << 20))
    monkeypatch.setenv("GLMSERVE_STUB_FAIL", fault)
    with pytest.raises(Exception, match=words):
        CudaSession(folders / "fp16", 4096).run(steps()["decode"])


def test_the_double_is_in_use():
    """On a machine with a GPU these tests must not pass for its sake."""
    assert all(name in os.environ for name in ("CUDA_STUB", "LD_LIBRARY_PATH"))
    assert os.environ["LD_LIBRARY_PATH"].split(":")[0] == os.environ["CUDA_STUB"]
