"""Owns how one Rust file is read: its submodules, the names that its `use` lines bind, the rest of its code.

Invariant: places in the blanked code are places in the file, so that a line number is true.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .error import LayersError

# Comments (nested ones up to two deep), raw strings, strings and characters, in this order.
OPAQUE = re.compile(
    r"""//[^\n]*
    | /\*(?:[^*/]|\*(?!/)|/(?!\*)|/\*(?:[^*]|\*(?!/))*\*/)*\*/
    | \bb?r(?P<hashes>\#*)".*?"(?P=hashes)
    | "(?:[^"\\]|\\.)*"
    | '(?:[^'\\\n]|\\[^u\n]|\\u\{[^}]*\}|\\x..)'
    """,
    re.VERBOSE | re.DOTALL,
)
# What may see an item is no use of it.
VISIBILITY = re.compile(r"\bpub\s*\(\s*in\s[^)]*\)")
TEST = re.compile(r"#\[cfg\((?:test|all\(test\b[^\]]*)\)\]")
USE = re.compile(r"(?<![\w$])(pub(?:\s*\([^)]*\))?\s+)?use\s+([\w:{}*,\s]+);")
MOD = re.compile(r"(?<![\w$])mod\s+(\w+)\s*;")
INLINE_MOD = re.compile(r"(?<![\w$])mod\s+(\w+)\s*\{")
PATH = re.compile(r"(?<![\w$:.])(?:::)?([A-Za-z_]\w*(?:\s*::\s*[A-Za-z_]\w*)+)")
DEFINES = r"\b(?:fn|struct|enum|union|trait|type|const|static|macro_rules!)\s+{}\b"


def blank(text: str) -> str:
    """As many characters with the same line ends, so that places in the text stay true."""
    return re.sub(r"[^\n]", " ", text)


def end_of_item(code: str, start: int) -> int:
    """Where the item ends that begins at `start`: behind its body, or its semicolon."""
    depth = 0
    has_body = not re.match(
        r"\s*(?:pub(?:\s*\([^)]*\))?\s+)?(?:use|const|static|type)\b(?!\s+fn)", code[start:]
    )
    for place in range(start, len(code)):
        if code[place] in "([{":
            depth += 1
        elif code[place] in ")]}":
            depth -= 1
            if depth == 0 and code[place] == "}" and has_body:
                return place + 1
        elif code[place] == ";" and depth == 0:
            return place + 1
    return len(code)


def product_code(text: str) -> str:
    """The text without comments, strings and what is compiled for tests only."""
    code = OPAQUE.sub(lambda found: blank(found[0]), text)
    code = VISIBILITY.sub(lambda found: "pub(crate)" + blank(found[0])[len("pub(crate)") :], code)
    while found := TEST.search(code):
        start = found.end()
        while attribute := re.match(r"\s*#\[", code[start:]):
            start = end_of_attribute(code, start + attribute.end())
        end = end_of_item(code, start)
        code = code[: found.start()] + blank(code[found.start() : end]) + code[end:]
    return code


def end_of_attribute(code: str, place: int) -> int:
    depth = 1
    while depth and place < len(code):
        depth += {"[": 1, "]": -1}.get(code[place], 0)
        place += 1
    return place


def use_tree(text: str) -> Iterator[tuple[list[str], str]]:
    """The paths of a `use`, each with the name that it binds; `*` binds all names."""
    text = text.strip()
    brace = text.find("{")
    if brace < 0:
        path, _, alias = re.sub(r"\s+as\s+", "=", text).partition("=")
        segments = [part.strip() for part in path.split("::") if part.strip()]
        if segments[-1] == "self" and len(segments) > 1:
            segments.pop()
        yield segments, alias.strip() or segments[-1]
        return
    prefix = text[:brace]
    for part in split_list(text[brace + 1 : text.rindex("}")]):
        yield from use_tree(prefix + part)


def split_list(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for place, char in enumerate(text + ","):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            if text[start:place].strip():
                yield text[start:place].strip()
            start = place + 1


@dataclass
class Binding:
    """A name that a `use` makes known in a module."""

    path: list[str]
    is_public: bool
    line: int
    # Inline modules that it stands in.
    inline: list[str]


@dataclass
class Module:
    """A source file."""

    file: Path
    name: str
    # Path of the crate in the repository.
    crate: str
    parent: "Module | None"
    code: str = ""
    children: dict[str, "Module"] = field(default_factory=dict)
    bindings: list[tuple[str, Binding]] = field(default_factory=list)
    # Code without its `use` lines.
    rest: str = ""
    inline_spans: list[tuple[int, int, str]] = field(default_factory=list)
    _line_starts: list[int] = field(default_factory=list)

    def read(self, folder: Path) -> None:
        """Reads the file and those of its submodules, which lie in `folder`."""
        self.code = product_code(self.file.read_text(encoding="utf-8"))
        self._line_starts = [0, *(found.end() for found in re.finditer("\n", self.code))]
        for found in INLINE_MOD.finditer(self.code):
            self.inline_spans.append((found.end(), end_of_item(self.code, found.start()), found[1]))
        for found in MOD.finditer(self.code):
            name = found[1]
            child_folder = folder.joinpath(*self.inline_at(found.start()), name)
            files = [child_folder.with_suffix(".rs"), child_folder / "mod.rs"]
            file = next((file for file in files if file.is_file()), None)
            if file is None:
                raise LayersError(f"{self.file}:{self.line(found.start())}: mod {name} has no file")
            child = Module(file, f"{self.name}/{name}".lstrip("/"), self.crate, self)
            self.children[name] = child
            child.read(child_folder)
        for found in USE.finditer(self.code):
            place = found.start()
            for path, name in use_tree(found[2]):
                self.bindings.append(
                    (name, Binding(path, bool(found[1]), self.line(place), self.inline_at(place)))
                )
        self.rest = USE.sub(lambda found: blank(found[0]), self.code)

    def line(self, place: int) -> int:
        return bisect_right(self._line_starts, place)

    def inline_at(self, place: int) -> list[str]:
        return [name for start, end, name in self.inline_spans if start <= place < end]

    def defines(self, name: str) -> bool:
        return bool(re.search(DEFINES.format(re.escape(name)), self.code))

    def mentions(self, name: str) -> bool:
        """Whether the code has the name besides in its `use` lines."""
        return bool(re.search(rf"(?<![\w:.]){re.escape(name)}\b(?!\s*:[^:])", self.rest))

    def and_below(self) -> Iterator["Module"]:
        yield self
        for child in self.children.values():
            yield from child.and_below()
