"""Owns the command line of `make bench-peers`."""

import argparse
import signal
import sys
from pathlib import Path

from . import loads, models, registry, tune
from .paths import WORK
from .rounds import Bench


def main() -> int:
    """Prepares, measures, reports; fails if a contender of ours has no figures."""
    # The servers end with the `with` blocks that hold them, so a signal must unwind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = _parser().parse_args()
    model = models.prepare(options.model)
    bench = Bench(model, registry.contenders(options.servers), options.out)
    bench.prepare(tune.read(model), with_divergence=not options.no_divergence)
    if options.tune:
        tune.run(bench, loads.choose([16, 64], [], 0, is_quick=True))
        return 0
    bench.run(loads.choose(options.streams, options.rates, options.mixed, options.quick), options.rounds)
    print((options.out / f"peers-{model.name}.md").read_text())
    measured = {sample["contender"] for sample in bench.result["samples"] if "run" in sample}
    missing = [
        name for name, row in bench.result["contenders"].items() if row["is_ours"] and name not in measured
    ]
    return 1 if missing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peers", description="Measure glmserve beside other servers.")
    parser.add_argument(
        "--model",
        choices=models.NAMES,
        default="m",
        help="m: 423 M random weights; 6b: ChatGLM3-6B's shape; default: the default chat model",
    )
    parser.add_argument(
        "--servers",
        type=_names,
        default=list(registry.DEFAULT),
        metavar="NAME,..",
        help=f"of {', '.join(registry.ALL)}",
    )
    parser.add_argument(
        "--streams", type=_integers, default=[1, 4, 16, 64], metavar="N,..", help="closed loops"
    )
    parser.add_argument(
        "--rates", type=_numbers, default=[1.0], metavar="R,..", help="open loops, requests/s"
    )
    parser.add_argument(
        "--mixed", type=int, default=8, metavar="N", help="streams with prompts of 128 and 1,024; 0: none"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--quick", action="store_true", help="half the requests, and shorter replies")
    parser.add_argument("--tune", action="store_true", help="choose each server's settings for later runs")
    parser.add_argument("--no-divergence", action="store_true", help="do not compare with float32")
    parser.add_argument("--out", type=Path, default=WORK, metavar="DIR", help="where reports go")
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in registry.ALL:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(registry.ALL)}")
    return names


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


if __name__ == "__main__":
    sys.exit(main())
