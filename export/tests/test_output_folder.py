"""Owns the folder's appearance: whole, ours alone, and cleared of what killed exports left."""

import fcntl
import os
import shutil
from collections import namedtuple

import pytest

from glm_export import cli, output_folder
from glm_export.error import ExportError

MARKER = "manifest.json"


def fill(folder, text="new"):
    (folder / MARKER).write_text(text)


def test_a_second_export_of_the_same_folder_is_refused(tmp_path):
    out = tmp_path / "out"
    with output_folder.output_folder(out, False, MARKER) as folder:
        with (
            pytest.raises(ExportError, match="another export is writing it"),
            output_folder.output_folder(out, True, MARKER),
        ):
            pass
        fill(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_is_named_and_removed(tmp_path, capsys):
    left = tmp_path / ".out.exporting"
    left.mkdir()
    (left / "model.onnx.data").write_bytes(bytes(1000))
    with output_folder.output_folder(tmp_path / "out", False, MARKER) as folder:
        assert list(folder.iterdir()) == []
        fill(folder)
    assert str(left) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_folder_that_was_being_replaced_comes_back(tmp_path, capsys, is_replaced):
    """Killed between two renames, or after both and before the old folder was removed."""
    old = tmp_path / ".out.replaced"
    old.mkdir()
    fill(old, "old")
    if is_replaced:
        (tmp_path / "out").mkdir()
        fill(tmp_path / "out")
    with (
        pytest.raises(ExportError, match="--force"),
        output_folder.output_folder(tmp_path / "out", False, MARKER),
    ):
        pass
    assert (tmp_path / "out" / MARKER).read_text() == ("new" if is_replaced else "old")
    assert ("is back" in capsys.readouterr().err) == (not is_replaced)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with output_folder.output_folder(tmp_path / "out", False, MARKER) as folder:
        fill(folder)
    assert (tmp_path / "out" / MARKER).exists()


def test_a_lock_is_not_inherited_by_the_result(tmp_path):
    with output_folder.output_folder(tmp_path / "out", False, MARKER) as folder:
        fill(folder)
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tiny_checkpoint, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 100_000))
    with pytest.raises(ExportError, match=r"has 0\.00 GB free, and the export needs 0\.00 GB"):
        cli.export(tiny_checkpoint, tmp_path / "out", "fp32")
    assert list(tmp_path.iterdir()) == []
