"""Owns the command line of `make test-clients`."""

import argparse
import json
import sys
from pathlib import Path

from . import catalogue, environments, runs, table

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Installs, runs and reports; fails if a client cannot do what it is listed to do."""
    options = _parser().parse_args()
    clients = [client for client in catalogue.CLIENTS if options.only in ("", client.name)]
    if not clients:
        names = ", ".join(client.name for client in catalogue.CLIENTS)
        sys.exit(f"--only: there is no client {options.only!r}; there are {names}")
    work = options.work.resolve()
    installed = {client.name: environments.install(client, work, options.newest) for client in clients}
    pace = runs.Pace(options.silence)
    results = runs.run_all(clients, installed, work, pace, options.at_once)
    text = table.render(clients, installed, results, options.silence)
    (work / "clients.md").write_text(text)
    (work / "clients.json").write_text(json.dumps([result.as_json() for result in results], indent=1))
    print(text)
    failed = [result for result in results if not result.ok]
    for result in failed:
        print(f"\n{result.client} / {result.ability} failed:\n{result.detail}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clients", description=__doc__)
    parser.add_argument("--only", default="", metavar="NAME", help="run this client alone")
    parser.add_argument(
        "--newest", action="store_true", help="install the newest releases instead of the pinned ones"
    )
    parser.add_argument(
        "--silence", type=float, default=12.0, metavar="S", help="length of each silence (default: 12)"
    )
    parser.add_argument("--at-once", type=int, default=6, metavar="N", help="programs that run at once")
    parser.add_argument("--work", type=Path, default=ROOT / ".tools" / "clients", metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
