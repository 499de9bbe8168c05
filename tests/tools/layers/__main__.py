"""Owns the command line of the check."""

import argparse
import sys
from pathlib import Path

from .check import findings
from .error import LayersError
from .rules import Rules
from .workspace import Workspace

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = Path("docs/architecture.md")


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the Rust files against the layers of architecture.md")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository [default: this one]")
    parser.add_argument("--graph", action="store_true", help="print which file uses which, and check nothing")
    args = parser.parse_args()
    root = args.root.resolve()
    try:
        rules = Rules.read((root / DOCUMENT).read_text(encoding="utf-8"))
        if args.graph:
            pairs = {(use.source, use.target) for use in Workspace(root, rules.crates).uses()}
            for source, target in sorted(pairs):
                print(source.relative_to(root), "->", target.relative_to(root))
            return 0
        problems = findings(root, rules)
    except LayersError as error:
        print(f"layers: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
