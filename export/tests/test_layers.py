"""The package's modules keep to the layers that its docstring lists, and form no circle."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import glm_export

PACKAGE = Path(glm_export.__file__).parent


def modules(package: Path) -> dict[str, set[str]]:
    """For each module, by its dotted name, those that it imports; types too."""
    names = {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }
    uses = {}
    for name, path in names.items():
        uses[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package.name:
                base = (node.module or "").removeprefix(package.name).removeprefix(".")
                targets = [f"{base}.{alias.name}".removeprefix(".") for alias in node.names]
                uses[name] |= {target if target in names else base for target in targets} & names.keys()
    return uses


def layers(docstring: str) -> dict[str, int]:
    lines = re.findall(r"^ {4}(\S.*)$", docstring, re.MULTILINE)
    return {name: level for level, line in enumerate(reversed(lines)) for name in line.split()}


def wrong(uses: dict[str, set[str]], level: dict[str, int]) -> list[str]:
    """Imports against the layers, modules in none, and circles."""
    found = [
        f"{name} is in no layer" for name in uses if name not in ("", "__init__") and top(name) not in level
    ]
    for name, targets in uses.items():
        for target in targets:
            if level.get(top(target), 0) > level.get(top(name), 99):
                found.append(f"{name} uses {target}, which is above it")
            if name in reachable(target, uses):
                found.append(f"{name} and {target} are in a circle")
    return found


def top(name: str) -> str:
    return name.split(".")[0]


def reachable(start: str, uses: dict[str, set[str]]) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        for target in uses.get(waiting.pop(), ()):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


def test_modules_keep_to_their_layers() -> None:
    uses = modules(PACKAGE)
    assert sum(map(len, uses.values())) > 80, "the imports are read"
    level = layers(glm_export.__doc__)
    assert level.keys() == {top(name) for name in uses} - {"__init__", ""}, "the list is whole"
    assert wrong(uses, level) == []


def test_a_circle_and_an_import_against_the_layers_are_found(tmp_path: Path) -> None:
    package = tmp_path / "made_up"
    (package / "low").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "low" / "__init__.py").write_text("")
    (package / "low" / "a.py").write_text("from made_up.low import b\nfrom made_up.high import thing\n")
    (package / "low" / "b.py").write_text("from made_up.low.a import name\n")
    (package / "high.py").write_text("")
    found = wrong(modules(package), {"high": 1, "low": 0})
    assert "low.a uses high, which is above it" in found
    assert "low.a and low.b are in a circle" in found
