"""Owns what the document allows."""

import re
from dataclasses import dataclass, field

from .error import LayersError


@dataclass
class Rules:
    """What the document says."""

    crates: dict[str, list[str]] = field(default_factory=dict)
    within: dict[str, list[list[str]]] = field(default_factory=dict)
    only: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> "Rules":
        rules = cls()
        for block in re.findall(r"^```layers\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                statement = line.partition("#")[0].strip()
                if not statement:
                    continue
                found = re.fullmatch(r"(crate|within|only)\s+([\w/-]+)\s*:\s*(.*)", statement)
                if found is None:
                    raise LayersError(f"a line of the layers cannot be read: {line}")
                kind, name, rest = found.groups()
                if kind == "crate":
                    rules.crates[name] = rest.split()
                elif kind == "within":
                    rules.within[name] = [layer.split() for layer in rest.split(">")]
                else:
                    rules.only[name] = rest.split()
        if not rules.crates:
            raise LayersError("the document has no block of layers")
        return rules


def layer_of(name: str, layers: list[list[str]]) -> int | None:
    """The number of a module's layer, from the top."""
    best, found = -1, None
    for number, layer in enumerate(layers):
        for prefix in layer:
            if (name == prefix or name.startswith(prefix + "/")) and len(prefix) > best:
                best, found = len(prefix), number
    return found
