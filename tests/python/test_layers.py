"""Owns the proof that tests/tools/layers finds what it is there to find, in small trees of made-up crates.

Invariant: each tree differs from one that passes in one line, so that it fails for that line alone.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tests" / "tools"

RULES = """\
# A document

```layers
crate low:
crate high: low
within low: top > middle > lib base   # from the top
only json: high/src
```
"""

# `low` uses its modules from the top down; `high` uses `low`.
TREE = {
    "docs/architecture.md": RULES,
    "low/Cargo.toml": '[package]\nname = "the-low"\n',
    "low/src/lib.rs": "mod base;\nmod middle;\nmod top;\npub use top::Top;\n",
    "low/src/top.rs": "use crate::middle::{self, Middle};\npub struct Top(Middle, middle::Other);\n",
    "low/src/middle.rs": (
        "mod part;\npub use self::part::Other;\nuse crate::base::Base;\npub struct Middle(Base);\n"
        "#[cfg(test)]\nmod tests {\n    use crate::top::Top;\n    fn f() -> [u8; 2] { todo!() }\n}\n"
    ),
    "low/src/middle/part.rs": (
        "// use crate::top::Top;\nuse super::Middle;\npub(in crate::top) struct Other(Box<Middle>);\n"
    ),
    "low/src/base.rs": 'pub struct Base;\npub const TEXT: &str = "use crate::top::Top; \\" //";\n',
    "high/Cargo.toml": '[package]\nname = "high"\n',
    "high/src/main.rs": "use json::Value;\nuse the_low::Top;\nfn main() { Top; }\n",
}


def check(root: Path, changes: dict[str, str]) -> tuple[int, str]:
    """The exit status and what was printed for the tree with these files in place of others."""
    for name, text in (TREE | changes).items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    command = [sys.executable, "-m", "layers", "--root", str(root)]
    environment = os.environ | {"PYTHONPATH": str(TOOLS)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return result.returncode, result.stdout + result.stderr


def test_a_tree_that_keeps_to_its_layers_passes(tmp_path):
    assert check(tmp_path, {}) == (0, "")


@pytest.mark.parametrize(
    ("change", "findings"),
    [
        pytest.param(
            {"low/src/base.rs": "use crate::middle::part::Other;\npub struct Base(Box<Other>);\n"},
            [
                "a circle of 3 files:",
                "low/src/base.rs:1 uses low/src/middle/part.rs",
                "low/src/middle.rs:3 uses low/src/base.rs",
                "low/src/base.rs:1 uses low/src/middle/part.rs, which is in a layer above it",
            ],
            id="circle through three files",
        ),
        pytest.param(
            # The re-export is followed: the circle has no part that only re-exports.
            {"low/src/base.rs": "use crate::Top;\npub struct Base(Box<Top>);\n"},
            ["low/src/base.rs:1 uses low/src/top.rs", "low/src/top.rs:1 uses low/src/middle.rs"],
            id="circle by a re-export",
        ),
        pytest.param(
            {"low/src/middle.rs": TREE["low/src/middle.rs"] + "fn f(_: &Other) {}\n"},
            [
                "a circle of 2 files:",
                "low/src/middle.rs:2 uses low/src/middle/part.rs",
                "low/src/middle/part.rs:2 uses low/src/middle.rs",
            ],
            id="parent that uses what it re-exports",
        ),
        pytest.param(
            {"low/src/middle.rs": TREE["low/src/middle.rs"] + "fn f() { part::Other::new() }\n"},
            ["low/src/middle.rs:10 uses low/src/middle/part.rs"],
            id="path without a use",
        ),
        pytest.param(
            {"low/src/lib.rs": "mod base;\nmod middle;\nmod top;\nuse top::Top;\nfn f(_: Top) {}\n"},
            ["low/src/lib.rs:4 uses low/src/top.rs, which is in a layer above it"],
            id="lower layer uses a higher one",
        ),
        pytest.param(
            {"low/src/base.rs": "mod inner {\n    use super::super::middle::Middle;\n}\npub struct Base;\n"},
            ["low/src/base.rs:2 uses low/src/middle.rs, which is in a layer above it"],
            id="inside an inline module",
        ),
        pytest.param(
            {"docs/architecture.md": RULES.replace("crate high: low", "crate high:")},
            ["high/src/main.rs:2 uses low/src/top.rs: high may not use low"],
            id="crate that may not be used",
        ),
        pytest.param(
            {"low/src/base.rs": "pub struct Base(json::Value);\n"},
            ["low/src/base.rs:1 uses the crate json, which only high/src may"],
            id="external crate out of its place",
        ),
        pytest.param(
            {"docs/architecture.md": RULES.replace("lib base", "lib")},
            ["low: base is in no layer"],
            id="file without a layer",
        ),
        pytest.param(
            {"docs/architecture.md": RULES.replace("lib base", "lib base gone")},
            ["low: a layer names gone, which is no module"],
            id="layer without a file",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, findings):
    status, output = check(tmp_path, change)
    assert status == 1, output
    for finding in findings:
        assert finding in output, output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"docs/architecture.md": "# Nothing\n"}, "no block of layers"),
        ({"docs/architecture.md": "```layers\ncrate low\n```\n"}, "cannot be read: crate low"),
        ({"low/src/lib.rs": "mod base;\nmod middle;\nmod top;\nmod lost;\n"}, "mod lost has no file"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path, change, message):
    status, output = check(tmp_path, change)
    assert status == 2 and message in output, output
