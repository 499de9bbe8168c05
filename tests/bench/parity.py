"""Prints how far glmserve's logits are from transformers' in float32, for a tiny random model of each member.

    GLMSERVE_ORT_LIB=... .venv/bin/python tests/bench/parity.py --glmserve target/release/glmserve

A row a member: the largest difference of any logit at fp32, the relative error at int8 and int4.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from glm_export.cli import export
from glm_export.dev import tiny
from glm_export.verify import check

PRECISIONS = ("fp32", "int8", "int4")


def main() -> None:
    """Exports and compares each member at each precision; a difference beyond rounding ends it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("members", nargs="*", metavar="MEMBER", help="some of them (all)")
    parser.add_argument("--glmserve", default="target/release/glmserve", metavar="BINARY")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| member | fp32: largest difference | int8: relative error | int4: relative error |")
    print("|---|---|---|---|")
    for member in options.members or tiny.MEMBERS:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / member
            tiny.write(checkpoint, seed=options.seed, member=member)
            found = {}
            for precision in PRECISIONS:
                out = Path(folder) / precision
                export(checkpoint, out, precision)
                found[precision] = check.compare(checkpoint, out, precision, options.glmserve)
        errors = f"{found['int8'].relative:.3f} | {found['int4'].relative:.3f}"
        print(f"| {member} | {found['fp32'].largest:.1e} | {errors} |", flush=True)


if __name__ == "__main__":
    main()
