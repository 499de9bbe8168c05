"""Owns what `--calibrate` promises: nearer logits in the same layout, the same bytes, clear refusals."""

import filecmp
import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from glm_export import calibration, cli
from glm_export.error import ExportError
from glm_export.graph.onnx_graph import DATA_FILE, GRAPH_FILE
from glm_export.read import config
from glm_export.verify import quality


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("calibration")
    cli.export(tiny_checkpoint, root / "plain", "int4")
    for name in ("first", "second"):
        cli.export(tiny_checkpoint, root / name, "int4", calibrate=calibration.TEXT)
    return root


def test_logits_are_nearer(tiny_checkpoint, folders):
    """On another text: the one that quality is measured on shares no line with that of calibration."""
    texts = [path.read_text(encoding="utf-8").splitlines() for path in (quality.TEXT, calibration.TEXT)]
    assert set(texts[0]) & set(texts[1]) <= {""}
    reference = quality.Reference(tiny_checkpoint, folders / "plain")
    plain, found = (reference.compare(folders / name) for name in ("plain", "first"))
    assert found.divergence < 0.75 * plain.divergence
    # Each matrix was rounded anew: by itself it is further off.
    assert all(found.weight_errors[name] > plain.weight_errors[name] for name in plain.weight_errors)


def test_the_layout_is_the_same_and_bytes_are_the_same_each_time(folders):
    plain, first, second = (folders / name for name in ("plain", "first", "second"))
    assert filecmp.cmp(plain / GRAPH_FILE, first / GRAPH_FILE, shallow=False)
    assert (plain / DATA_FILE).stat().st_size == (first / DATA_FILE).stat().st_size
    digests = [
        json.loads((folder / "manifest.json").read_text())["digest"] for folder in (plain, first, second)
    ]
    assert digests[0] != digests[1] == digests[2]


def test_another_text_may_be_given(tiny_checkpoint, folders, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The brown hens of the valley lay in spring. " * 40, encoding="utf-8")
    options = ["--precision", "int4", "--output", "topk", "--calibration-text", text]
    arguments = [*options, tiny_checkpoint, tmp_path / "out"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert not filecmp.cmp(tmp_path / "out" / DATA_FILE, folders / "first" / DATA_FILE, shallow=False)


def test_the_option_takes_no_path_for_its_own(tiny_checkpoint, folders, tmp_path):
    arguments = ["--precision", "int4", "--calibrate", tiny_checkpoint, tmp_path / "out"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert filecmp.cmp(tmp_path / "out" / DATA_FILE, folders / "first" / DATA_FILE, shallow=False)


def test_no_more_of_a_text_is_read_than_serves(tiny_checkpoint, folders, tmp_path, monkeypatch):
    settings = config.load(tiny_checkpoint, None)
    text = tmp_path / "text.txt"
    # Not UTF-8 in the end, which nobody gets to: a reader takes some thousand bytes at a time.
    text.write_bytes("鸡。".encode() * calibration.MAX_CHARACTERS + b"\xff")
    read = calibration.sequences(settings, text, folders / "plain")
    assert len(read) == calibration.NUM_SEQUENCES + calibration.NUM_ARBITRARY


def test_a_text_that_says_too_little_is_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(ExportError, match="--max-model-len leaves no room for a text"):
        cli.export(tiny_checkpoint, tmp_path / "out", "int4", calibrate=calibration.TEXT, max_model_len=2)
    text = tmp_path / "text.txt"
    text.write_text("Too short.", encoding="utf-8")
    with pytest.raises(
        ExportError, match=r"--calibration-text .*text.txt: \d+ tokens, and \d+ are the least"
    ):
        cli.export(tiny_checkpoint, tmp_path / "out", "int4", calibrate=text)
    text.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ExportError, match=r"--calibration-text .*text\.txt: not a text"):
        cli.export(tiny_checkpoint, tmp_path / "out", "int4", calibrate=text)
    with pytest.raises(ExportError, match=r"--calibration-text .*missing\.txt"):
        cli.export(tiny_checkpoint, tmp_path / "out", "int4", calibrate=tmp_path / "missing.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("precision", "kernel"), [("int8", "glmserve"), ("int4", "ort"), ("fp32", None)])
def test_what_is_not_rounded_so_is_refused(tiny_checkpoint, tmp_path, precision, kernel):
    with pytest.raises(ExportError, match="--calibration-text round weights of --precision int4"):
        cli.export(tiny_checkpoint, tmp_path / "out", precision, kernel=kernel, calibrate=calibration.TEXT)


def with_large(checkpoint, folder, tensor, value):
    """A copy of the checkpoint that has this value in a tensor of layer 1."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"transformer.encoder.layers.1.{tensor}"][3] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_weight_that_float16_cannot_scale_names_its_tensor(tiny_checkpoint, tmp_path):
    folder = with_large(tiny_checkpoint, tmp_path / "in", "mlp.dense_4h_to_h.weight", 1e7)
    with pytest.raises(ExportError, match=r"1\.mlp\.dense_4h_to_h\.weight: a scale of .* beyond float16"):
        cli.export(folder, tmp_path / "out", "int4")


def test_what_enters_and_has_no_square_names_its_product(tiny_checkpoint, tmp_path):
    folder = with_large(tiny_checkpoint, tmp_path / "in", "input_layernorm.weight", 1e25)
    with pytest.raises(ExportError, match=r"--calibrate: what enters layers\.1\.\w+ is not finite"):
        cli.export(folder, tmp_path / "out", "int4", calibrate=calibration.TEXT)
