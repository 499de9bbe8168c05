"""Owns `--check` itself, against a stand-in for glmserve that answers with the reference's own logits."""

import stat
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from glm_export import cli
from glm_export.error import ExportError
from glm_export.read import config
from glm_export.verify import check

STAND_IN = """#!{python}
import sys
import numpy as np
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert sys.argv[1] == "logits" and set(options) == {{"--model", "--ids", "--out"}}
{body}
"""


def stand_in(folder, body):
    path = folder / "glmserve"
    path.write_text(STAND_IN.format(python=sys.executable, body=body))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_equal_logits_agree(tiny_checkpoint, tmp_path, capsys):
    pytest.importorskip("transformers", reason="the reference is transformers: pip install '.[check]'")
    ids = check.sample_ids(config.load(tiny_checkpoint))
    np.save(tmp_path / "own.npy", check.reference_logits(tiny_checkpoint, ids))
    body = f"""
assert options["--ids"] == {",".join(map(str, ids))!r}
np.save(options["--out"], np.load({str(tmp_path / "own.npy")!r}))
"""
    arguments = [tiny_checkpoint, tmp_path / "out", "--precision", "fp32", "--check"]
    code = cli.main([*map(str, arguments), "--glmserve", stand_in(tmp_path, body)])
    found = capsys.readouterr()
    assert code == 0, found.err
    assert "64 tokens: largest difference 0, relative error 0, top-1 agreement 100.0%" in found.out


@pytest.mark.parametrize("missing", ["glmserve", "transformers"])
def test_what_it_lacks_is_said_before_the_export(tiny_checkpoint, tmp_path, capsys, monkeypatch, missing):
    binary = stand_in(tmp_path, "") if missing == "transformers" else str(tmp_path / "glmserve")
    monkeypatch.setattr(check, "find_spec", lambda name: None if name == missing else find_spec(name))
    monkeypatch.setattr(cli, "export", lambda *_, **__: pytest.fail("the export began"))
    arguments = [str(tiny_checkpoint), str(tmp_path / "out"), "--precision", "fp32", "--check"]
    assert cli.main([*arguments, "--glmserve", binary]) == 1
    assert missing in capsys.readouterr().err


def test_failing_engine_is_named(tiny_checkpoint, tmp_path):
    binary = stand_in(tmp_path, "print('first'), sys.exit('the engine says why')")
    with pytest.raises(ExportError, match="failed with 1: the engine says why"):
        check.compare(tiny_checkpoint, tmp_path, "fp32", binary)


def test_differences():
    expected = np.eye(4, 8, dtype=np.float32)
    found = expected.copy()
    found[0] = [0, 0.5, 0, 0, 0, 0, 0, 0]
    text = str(check.difference(found, expected, "int4"))
    assert text == "4 tokens: largest difference 1, relative error 0.559, top-1 agreement 75.0%"
    with pytest.raises(ExportError, match=r"relative error 0\.559.*more than the 0\.1 that int8 may be off"):
        check.difference(found, expected, "int8")
    with pytest.raises(ExportError, match="shape"):
        check.difference(found[:2], expected, "fp32")
    with pytest.raises(ExportError, match="nan"):
        check.difference(expected * np.nan, expected, "fp32")
