"""Owns the crates of the workspace, and which of their files uses which.

Invariant: a use ends at the file that defines the item, however many re-exports lie between.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .error import LayersError
from .source import PATH, Module


@dataclass
class Crate:
    """A crate of the workspace."""

    path: str
    # As `use` has it.
    name: str
    library: Module | None = None
    program: Module | None = None

    def modules(self) -> Iterator[Module]:
        for root in (self.library, self.program):
            if root is not None:
                yield from root.and_below()


@dataclass(frozen=True)
class Use:
    """That one file uses another."""

    source: Path
    line: int
    target: Path


class Workspace:
    """All crates that the document names."""

    def __init__(self, root: Path, paths: Iterable[str]):
        self.root = root
        self.crates = {}
        for path in paths:
            manifest = (root / path / "Cargo.toml").read_text(encoding="utf-8")
            section = re.search(r"^\[lib\][^\[]*?^name\s*=\s*\"([^\"]+)\"", manifest, re.MULTILINE)
            name = section or re.search(r"^name\s*=\s*\"([^\"]+)\"", manifest, re.MULTILINE)
            if name is None:
                raise LayersError(f"{path}/Cargo.toml has no name")
            crate = Crate(path, name[1].replace("-", "_"))
            self.crates[crate.name] = crate
            for attribute, file in (("library", "lib.rs"), ("program", "main.rs")):
                source = root / path / "src" / file
                if source.is_file():
                    module = Module(source, "", crate.path, None)
                    setattr(crate, attribute, module)
                    module.read(source.parent)
                    module.name = file.removesuffix(".rs")

    def modules(self) -> Iterator[Module]:
        for crate in self.crates.values():
            yield from crate.modules()

    def uses(self) -> list[Use]:
        """Every use of one file by another, once for each line."""
        found = set()
        for module in self.modules():
            for name, binding in module.bindings:
                if binding.is_public and (name == "*" or not module.mentions(name)):
                    continue
                target = self.resolve(module, binding.path, binding.inline)
                if target is not None and target[0].file != module.file:
                    found.add(Use(module.file, binding.line, target[0].file))
            for path in PATH.finditer(module.rest):
                segments = re.split(r"\s*::\s*", path[1])
                target = self.resolve(module, segments, module.inline_at(path.start()))
                if target is not None and target[0].file != module.file:
                    found.add(Use(module.file, module.line(path.start()), target[0].file))
        return sorted(found, key=lambda use: (use.source, use.line, use.target))

    def resolve(
        self, module: Module, path: list[str], inline: list[str], seen: frozenset = frozenset()
    ) -> tuple[Module, list[str]] | None:
        """The file that a path of `module` leads to, and what of the path names an item there. None if it
        leads out of the workspace."""
        if (module.file, tuple(path)) in seen:
            return None
        seen = seen | {(module.file, tuple(path))}
        first, rest = path[0], path[1:]
        inline = list(inline)
        if first == "crate":
            root = module
            while root.parent is not None:
                root = root.parent
            return self.descend(root, rest, seen)
        if first in ("self", "super"):
            here = module
            if first == "super":
                here = self.above(module, inline)
            while rest and rest[0] == "super" and here is not None:
                here, rest = self.above(here, inline), rest[1:]
            return None if here is None else self.descend(here, rest, seen)
        if first in module.children:
            return self.descend(module.children[first], rest, seen)
        for name, binding in module.bindings:
            if name == first and binding.path != path:
                return self.resolve(module, binding.path + rest, binding.inline, seen)
        crate = self.crates.get(first)
        if crate is not None and crate.library is not None:
            return self.descend(crate.library, rest, seen)
        return None

    @staticmethod
    def above(module: Module, inline: list[str]) -> Module | None:
        """The module above, which for an inline one is its file."""
        if inline:
            inline.pop()
            return module
        return module.parent

    def descend(self, module: Module, path: list[str], seen: frozenset) -> tuple[Module, list[str]]:
        """Follows a path from a module down to the file that has what it names."""
        if not path or path[0] == "*":
            return module, []
        first, rest = path[0], path[1:]
        if first in module.children:
            return self.descend(module.children[first], rest, seen)
        for name, binding in module.bindings:
            if name == first:
                target = self.resolve(module, binding.path + rest, binding.inline, seen)
                # An item of another project's crate is this module's own, as far as files go.
                return target or (module, path)
        if not module.defines(first):
            for name, binding in module.bindings:
                if name == "*" and binding.is_public:
                    target = self.resolve(module, binding.path[:-1], binding.inline, seen)
                    if target is not None and not target[1]:
                        end, left = self.descend(target[0], path, seen)
                        if end is not target[0] or end.defines(first):
                            return end, left
        return module, path
