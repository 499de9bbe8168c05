"""Owns the weight readers: both formats agree, and every defect is named."""

import io
import json
import pickle
import re
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from glm_export.error import ExportError
from glm_export.read.checkpoint import Checkpoint, require

GENERATOR = np.random.default_rng(0)
TENSORS = {
    "a.weight": GENERATOR.standard_normal((5, 3), dtype=np.float32),
    "b.weight": GENERATOR.standard_normal(7, dtype=np.float32).astype(np.float16),
}


def read(folder):
    return {name: tensor.rows() for name, tensor in Checkpoint(folder).items()}


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = read(tmp_path)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32))
        assert found[name].dtype == np.float32


def test_torch_and_safetensors_agree(tmp_path):
    torch = pytest.importorskip("torch", reason="a .bin to read is made with torch: pip install '.[check]'")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    generator = torch.Generator().manual_seed(0)
    state = {
        "half": torch.randn(4, 6, generator=generator).half(),
        "brain": torch.randn(3, 2, 2, generator=generator).bfloat16(),
        "single": torch.randn(9, generator=generator),
        # A view into a storage that it does not begin.
        "window": torch.randn(10, 4, generator=generator)[3:7],
        "parameter": torch.nn.Parameter(torch.randn(2, 2, generator=generator)),
    }
    shards = {"pytorch_model-00001.bin": ["half", "brain"], "pytorch_model-00002.bin": ["single", "window"]}
    shards["pytorch_model-00002.bin"].append("parameter")
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    for file, names in shards.items():
        torch.save({name: state[name] for name in names}, old / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    plain = {name: tensor.detach().clone() for name, tensor in state.items()}
    safetensors_torch.save_file(plain, new / "model.safetensors")
    found, expected = read(old), read(new)
    assert found.keys() == expected.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(found[name], state[name].detach().float().numpy())


def test_transposed_torch_tensor_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="a .bin to read is made with torch: pip install '.[check]'")
    torch.save({"w": torch.zeros(2, 3).T}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ExportError, match="tensor w is stored with strides"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_flipped_bytes_are_an_error_or_other_numbers(tmp_path, file):
    path = tmp_path / file
    if file.endswith(".bin"):
        torch = pytest.importorskip(
            "torch", reason="a .bin to read is made with torch: pip install '.[check]'"
        )
        torch.save({"w": torch.zeros(3, 4), "v": torch.ones(5).half()}, path)
    else:
        save_file(TENSORS, path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), 3):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            read(tmp_path)
        except ExportError as error:
            # Most damage is refused, some only changes numbers, some makes them no numbers.
            assert file in str(error) or "not finite" in str(error)  # noqa: PT017
            refused += 1
    assert refused > 50


def archive(path, pickled):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    return path


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize("state", [{"w": Evil()}, {"w": np.zeros(3)}], ids=["call", "foreign class"])
def test_pickle_runs_no_code(tmp_path, state, capsys):
    archive(tmp_path / "pytorch_model.bin", pickle.dumps(state))
    with pytest.raises(ExportError, match="refused to load"):
        Checkpoint(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (pickle.dumps([1, 2]), "not a torch state dict"),
        (pickle.dumps({"w": 1}), "'w' is not a tensor"),
        (b"", "not a torch state dict"),
        (b"R.", "not a torch state dict"),
    ],
)
def test_broken_pickle_is_named(tmp_path, pickled, message):
    archive(tmp_path / "pytorch_model.bin", pickled)
    with pytest.raises(ExportError, match=message):
        Checkpoint(tmp_path)


def test_storage_that_is_not_there(tmp_path):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", "F32", "0", "cpu", 4) if value is Ellipsis else None

    written = io.BytesIO()
    Pickler(written).dump({"w": ...})
    archive(tmp_path / "pytorch_model.bin", written.getvalue())
    with pytest.raises(ExportError, match="no storage 0"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 16, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{}x" * 9]
)
def test_broken_files_are_named(tmp_path, content):
    for name in ("model.safetensors", "pytorch_model.bin"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        if content.endswith(b"{}x") and name == "model.safetensors":
            assert len(Checkpoint(folder)) == 0
        else:
            with pytest.raises(ExportError, match=name):
                Checkpoint(folder)


def test_cut_off_safetensors_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ExportError, match="reaches beyond its data"):
        Checkpoint(tmp_path)


def test_integer_weights_are_refused(tmp_path):
    save_file({"w": np.zeros(4, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match="tensor w has type I8"):
        Checkpoint(tmp_path)
    save_file({"w": np.zeros(4, np.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match="tensor w has type I32"):
        read(tmp_path)


def test_index_promises_are_kept(tmp_path):
    save_file(TENSORS, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"c.weight": "one.safetensors"}}))
    with pytest.raises(ExportError, match=r"the index lists c\.weight"):
        Checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a.weight": "two.safetensors"}}))
    with pytest.raises(ExportError, match=r"two\.safetensors is missing"):
        Checkpoint(tmp_path)


# What Python says of such a value helps nobody who has the file.
PYTHON = re.compile("object|indices|attribute|argument|iterable|integers|NoneType|codec|buffer")


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "1", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "[" * 100_000, "\udcff"],
)
def test_an_index_of_another_shape_is_named(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content, errors="surrogateescape")
    with pytest.raises(ExportError) as error:
        Checkpoint(tmp_path)
    assert str(index) in str(error.value)
    words = str(error.value).replace("JSON object", "").replace("an object that", "")
    assert not PYTHON.search(words), words


@pytest.mark.parametrize(
    "header",
    [
        [],
        1,
        {"w": []},
        {"w": {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]}},
        {"w": {"dtype": "F32", "shape": ["3"], "data_offsets": [0, 12]}},
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0]}},
        {"w": {"dtype": ["F32"], "shape": [3], "data_offsets": [0, 12]}},
        {"w": {"shape": [3], "data_offsets": [0, 12]}},
    ],
)
def test_a_header_of_another_shape_is_named(tmp_path, header):
    written = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(written).to_bytes(8, "little") + written + bytes(12))
    with pytest.raises(ExportError, match="not a safetensors file: ") as error:
        Checkpoint(tmp_path)
    assert str(path) in str(error.value)
    words = str(error.value).replace("is not an object", "")
    assert not PYTHON.search(words), words


def test_folder_without_weights(tmp_path):
    with pytest.raises(ExportError, match="has no weights"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a.weight": (5, 3)}, r"tensor b.weight of shape \[7\] has no place"),
        ({"a.weight": (5, 3), "b.weight": (7,), "c": (2, 1)}, r"c is missing, expected shape \[2, 1\]"),
        ({"a.weight": (3, 5), "b.weight": (7,)}, r"a.weight has shape \[5, 3\], expected \[3, 5\]"),
    ],
)
def test_require_is_strict(tmp_path, shapes, message):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=message):
        require(Checkpoint(tmp_path), shapes, frozenset())


def test_inv_freq_is_ignored(tmp_path, tiny_checkpoint):
    from glm_export.read import config, weights

    settings = config.load(tiny_checkpoint)
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    save_file(
        tensors | {"transformer.rotary_pos_emb.inv_freq": np.zeros(4, np.float32)},
        tmp_path / "model.safetensors",
    )
    require(Checkpoint(tmp_path), weights.shapes(settings), weights.IGNORED)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    save_file({"w": np.array([[0, 1], [value, 2]], np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"w: rows 0 to 1 hold values that are not finite"):
        read(tmp_path)
