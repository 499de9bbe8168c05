"""Owns the comparison of what the files do with what the document allows.

Invariant: of files that use one another in a circle one shortest circle is told, with the line of each step.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from .error import LayersError
from .rules import Rules, layer_of
from .workspace import Use, Workspace


def circles(uses: Iterable[Use]) -> list[list[Use]]:
    """For each group of files that use one another in a circle, one of its shortest circles."""
    graph = defaultdict(dict)
    for use in uses:
        graph[use.source].setdefault(use.target, use)
    found, done = [], set()
    for start in sorted(graph):
        if start in done:
            continue
        # Breadth first, so that the way back is a shortest one.
        came_by, queue = {}, [start]
        for file in queue:
            for target, use in sorted(graph.get(file, {}).items()):
                if target not in came_by:
                    came_by[target] = use
                    queue.append(target)
        if start not in came_by:
            continue
        circle = [came_by[start]]
        while circle[0].source != start:
            circle.insert(0, came_by[circle[0].source])
        found.append(circle)
        done |= {file for file in came_by if reaches(graph, file, start)}
    return found


def reaches(graph: dict, start: Path, goal: Path) -> bool:
    seen, queue = set(), [start]
    for file in queue:
        for target in graph.get(file, {}):
            if target == goal:
                return True
            if target not in seen:
                seen.add(target)
                queue.append(target)
    return False


def findings(root: Path, rules: Rules) -> list[str]:
    """What is wrong, one line or paragraph each."""
    workspace = Workspace(root, rules.crates)
    uses = workspace.uses()
    modules = {module.file: module for module in workspace.modules()}

    def at(file: Path) -> str:
        return file.relative_to(root).as_posix()

    problems = []
    for circle in circles(uses):
        steps = "".join(f"\n  {at(use.source)}:{use.line} uses {at(use.target)}" for use in circle)
        problems.append(f"a circle of {len(circle)} files:{steps}")
    told = set()
    for use in uses:
        source, target = modules[use.source], modules[use.target]
        if (use.source, use.target) in told:
            continue
        told.add((use.source, use.target))
        where = f"{at(use.source)}:{use.line} uses {at(use.target)}"
        if source.crate != target.crate:
            if target.crate not in rules.crates[source.crate]:
                problems.append(f"{where}: {source.crate} may not use {target.crate}")
        elif layers := rules.within.get(source.crate):
            numbers = layer_of(source.name, layers), layer_of(target.name, layers)
            if None not in numbers and numbers[0] > numbers[1]:
                problems.append(f"{where}, which is in a layer above it")
    for path, layers in rules.within.items():
        crate = next((crate for crate in workspace.crates.values() if crate.path == path), None)
        if crate is None:
            raise LayersError(f"`within {path}` names no crate")
        names = {module.name for module in crate.modules()}
        problems += [
            f"{path}: {name} is in no layer" for name in sorted(names) if layer_of(name, layers) is None
        ]
        for prefix in (prefix for layer in layers for prefix in layer):
            if not any(name == prefix or name.startswith(prefix + "/") for name in names):
                problems.append(f"{path}: a layer names {prefix}, which is no module")
    for name, places in rules.only.items():
        pattern = re.compile(rf"(?<![\w:$]){name}\s*::|\buse\s+(?:::)?{name}\b")
        for module in modules.values():
            here = at(module.file)
            if any(here == f"{place}.rs" or here.startswith(f"{place}/") for place in places):
                continue
            if found := pattern.search(module.code):
                line = module.line(found.start())
                problems.append(f"{here}:{line} uses the crate {name}, which only {', '.join(places)} may")
    return problems
