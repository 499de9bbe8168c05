"""`glmserve check` and the known answer: a damaged folder is refused with words, by check and by serve."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from conftest import DEFAULT_MODEL, GLMSERVE
from glm_export.graph import manifest as exported_manifest


def check(folder):
    return subprocess.run([GLMSERVE, "check", folder], capture_output=True, text=True, timeout=120)


def link(source, target):
    try:
        os.link(source, target)
    except OSError:
        # Another file system.
        shutil.copyfile(source, target)


def copy_of(model, folder):
    """Links, since the weights are large: a test that changes a file replaces it."""
    shutil.copytree(model, folder, copy_function=link)
    return folder


def replace(path, content: bytes):
    path.unlink()
    path.write_bytes(content)


def edit(folder, change, file="manifest.json"):
    content = json.loads((folder / file).read_text())
    change(content)
    replace(folder / file, json.dumps(content).encode())


def sign(folder, name):
    """Makes the manifest say that the file is as it is: only its meaning is wrong then."""

    def change(manifest):
        content = (folder / name).read_bytes()
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["files"][name] = entry
        manifest["digest"] = exported_manifest.digest(manifest["files"])

    edit(folder, change)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tiny checkpoint at each precision; another module's may be of one only."""
    folder = tmp_path_factory.mktemp("check")
    subprocess.run([sys.executable, "-m", "glm_export.dev.tiny", folder / "checkpoint"], check=True)
    for precision in ("fp32", "int8", "int4"):
        export = [
            Path(sys.executable).with_name("glm-export"),
            folder / "checkpoint",
            folder / precision,
            "--precision",
            precision,
        ]
        subprocess.run(export, check=True)
    return folder


def test_the_default_model_is_whole():
    result = check(DEFAULT_MODEL)
    assert result.returncode == 0, result.stdout + result.stderr
    names = [line.split(":")[0] for line in result.stdout.splitlines()]
    files = sorted(path.name for path in DEFAULT_MODEL.iterdir() if path.name != "manifest.json")
    checks = ["manifest", *(f"file {name}" for name in files)]
    checks += ["tokenizer", "chat format", "graph", "known answer"]
    assert names == [f"ok   {name}" for name in checks]


def flip_a_byte(folder):
    content = bytearray((folder / "model.onnx.data").read_bytes())
    content[len(content) // 2] ^= 1
    replace(folder / "model.onnx.data", bytes(content))


def truncate(folder):
    replace(folder / "model.onnx.data", (folder / "model.onnx.data").read_bytes()[:-4096])


def remove(folder):
    (folder / "model.onnx.data").unlink()


def edit_geometry(folder):
    edit(folder, lambda manifest: manifest["geometry"].update(num_layers=29))


def swap_tokenizer(folder):
    """By one of another kind; the files are then as the manifest says."""
    pieces = {f"▁{number}": number for number in range(256)}
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= {"vocab": pieces | {"<unk>": 256}, "merges": [], "unk_token": "<unk>"}
    replace(folder / "tokenizer.json", json.dumps(content).encode())
    sign(folder, "tokenizer.json")


def change_known_answer(folder):
    def change(known):
        known["rows"][7]["top"][0][1] += 10 * known["rows"][7]["deviation"]

    edit(folder, change, "known_answer.json")
    sign(folder, "known_answer.json")


def drop_known_answer(folder):
    def change(manifest):
        del manifest["files"]["known_answer.json"]
        manifest["digest"] = exported_manifest.digest(manifest["files"])

    edit(folder, change)


def later_version(folder):
    edit(folder, lambda manifest: manifest.update(schema_version=2))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (flip_a_byte, ["FAIL file model.onnx.data", "another content"]),
        (truncate, ["FAIL file model.onnx.data", "were exported: its copy is not whole"]),
        (remove, ["FAIL file model.onnx.data", "No such file"]),
        (edit_geometry, ["FAIL graph", "the graph has 67 inputs, the manifest 65"]),
        (swap_tokenizer, ["FAIL tokenizer", "comes back as", "another model's"]),
        (change_known_answer, ["FAIL known answer", "at position 7", "expected"]),
        (drop_known_answer, ["FAIL known answer", "export again"]),
        (later_version, ["FAIL manifest", "schema_version 2 and needs a glmserve that reads it"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named(tmp_path, damage, line):
    folder = copy_of(DEFAULT_MODEL, tmp_path / "model")
    damage(folder)
    result = check(folder)
    assert result.returncode == 1, result.stdout
    failed = [line for line in result.stdout.splitlines() if not line.startswith("ok   ")]
    assert failed and all(words in failed[0] for words in line), result.stdout
    assert "glmserve: " in result.stderr and "panicked" not in result.stderr


def swap_gate_and_up(graph):
    split = next((node for node in graph.node if node.op_type == "Split"), None)
    if split is not None:
        split.output[0], split.output[1] = split.output[1], split.output[0]
        return
    # Inside one operator with packed weights they cannot be swapped in the graph; two layers' can.
    first, second = (node for node in graph.node if node.op_type == "PostAttention")
    first.input[4], second.input[4] = second.input[4], first.input[4]


def swap_cos_and_sin(graph):
    node = next(node for node in graph.node if node.op_type == "PagedAttention")
    node.input[8], node.input[9] = node.input[9], node.input[8]


def rotate_halves(graph):
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "rotary_interleaved":
                attribute.i = 0


def read_another_block(graph):
    """The second for the first, and the other way round."""
    graph.initializer.append(onnx.helper.make_tensor("one", onnx.TensorProto.INT32, [1], [1]))
    for node in graph.node:
        if node.op_type == "PagedAttention":
            node.input[7] = "wrong_table"
    graph.node.insert(0, onnx.helper.make_node("Sub", ["one", "block_table"], ["wrong_table"]))


def nothing(graph):
    pass


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize(
    "fault", [nothing, swap_gate_and_up, swap_cos_and_sin, rotate_halves, read_another_block]
)
def test_a_machine_that_computes_something_else_is_refused(models, tmp_path, precision, fault):
    """The engine's own attention runs here; every hash is right, so only the answer can show it."""
    folder = copy_of(models / precision, tmp_path / "model")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    fault(model.graph)
    replace(folder / "model.onnx", model.SerializeToString())
    sign(folder, "model.onnx")
    result = check(folder)
    assert result.returncode == (0 if fault is nothing else 1), result.stdout
    if fault is nothing:
        return
    words = "this machine computes something else than what was exported"
    assert f"FAIL known answer: {words}" in result.stdout
    served = subprocess.run(
        [GLMSERVE, "serve", "--model", folder, "--port", "0"], capture_output=True, text=True, timeout=60
    )
    assert served.returncode == 1 and words in served.stderr, served.stderr
