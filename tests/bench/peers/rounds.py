"""Owns the measuring: rounds in which each contender takes its turn, the machine probed around each load.

Invariant: the servers run one at a time, and what is on disk after each turn is a whole result.
"""

import json
import time
from pathlib import Path

from . import divergence, loads, machine, picture, registry, table
from .contender import Contender, Settings
from .loads import Load
from .models import Model
from .paths import NUM_THREADS
from .unavailable import Unavailable

REPORTS = {"json": lambda result: json.dumps(result, indent=1), "md": table.render, "svg": picture.render}


class Bench:
    """A run: the model, who takes part with which settings, and what was measured so far."""

    def __init__(self, model: Model, contenders: list[Contender], out: Path) -> None:
        self.model = model
        self.contenders = contenders
        self.out = out
        self.settings: dict[str, Settings] = {}
        self.result = {
            "model": model.name,
            "machine": machine.description(),
            "threads": NUM_THREADS,
            "date": time.strftime("%Y-%m-%d"),
            "num_layer_weights": model.num_layer_weights,
            "num_head_weights": model.num_head_weights,
            "rounds": 0,
            "contenders": {},
            "left_out": registry.LEFT_OUT,
            "loads": [],
            "probes": [],
            "typical": {},
            "samples": [],
        }

    def prepare(self, settings: dict[str, Settings], with_divergence: bool) -> None:
        """Installs, converts and compares; who cannot is out, with the reason."""
        ready = []
        for contender in self.contenders:
            _say(f"{contender.name}: prepare")
            row = {"is_ours": registry.is_ours(contender.name)}
            self.result["contenders"][contender.name] = row
            try:
                contender.prepare(self.model)
                self.settings[contender.name] = contender.defaults() | settings.get(contender.name, {})
                row |= {
                    "bits": contender.bits_per_weight(self.model),
                    "kv_dtype": contender.kv_dtype,
                    "settings": self.settings[contender.name],
                }
                if with_divergence:
                    row |= divergence.measure(self.model, contender)
                ready.append(contender)
            # Whatever goes wrong with one must not cost the others' figures.
            except Exception as error:
                row["error"] = str(error) or type(error).__name__
                _say(f"{contender.name}: not available: {error}")
        self.contenders = ready

    def run(self, chosen: list[Load], rounds: int) -> None:
        """All rounds; a report is written after every turn."""
        self.result["loads"] = [load.name for load in chosen]
        for number in range(rounds):
            for contender in self.contenders:
                self.turn(contender, self.settings[contender.name], chosen, number)
                self.result["rounds"] = number + 1
                self.write()

    def turn(self, contender: Contender, settings: Settings, chosen: list[Load], number: int) -> list[dict]:
        """One contender under every load; returns the samples, which the result has too."""
        samples = []
        try:
            with contender.start(self.model, settings) as server:
                server.wait_ready(contender.ready_timeout_s)
                for load in chosen:
                    sample = {"round": number, "contender": contender.name, "load": load.name}
                    sample["probes"] = [self.probe()]
                    try:
                        sample["run"] = loads.generate(load, server.url, seed=1000 * number + 17)
                    except Exception as error:
                        sample["error"] = f"{error}: {server.log_tail()}"
                    sample["probes"].append(self.probe())
                    sample |= {"ready_s": server.ready_s, "memory_mib": server.memory_mib()}
                    samples.append(sample)
                    _say(f"round {number + 1}, {contender.name}, {load.name}: {_short(sample)}")
        except Unavailable as error:
            for load in chosen[len(samples) :]:
                failed = {"round": number, "contender": contender.name, "load": load.name}
                samples.append(failed | {"probes": [], "error": str(error)})
            _say(f"round {number + 1}, {contender.name}: {error}")
        self.result["samples"] += samples
        return samples

    def probe(self) -> dict:
        """Asks the machine; the answer is kept for the median of all."""
        found = machine.probe()
        self.result["probes"].append(found)
        return found

    def write(self) -> None:
        """Writes the report in its three forms."""
        self.result["typical"] = machine.medians(self.result["probes"])
        self.out.mkdir(parents=True, exist_ok=True)
        for suffix, render in REPORTS.items():
            path = self.out / f"peers-{self.model.name}.{suffix}"
            path.write_text(render(self.result), encoding="utf-8")


def _short(sample: dict) -> str:
    if "error" in sample:
        return sample["error"]
    run, probe = sample["run"], sample["probes"][0]
    itl = run["itl_ms"]["p99"] if run["itl_ms"] else float("nan")
    output, read = run["output_tokens_per_s"], probe["read_gb_per_s"]
    return f"{output:.1f} tok/s, ITL p99 {itl:.0f} ms, read {read:.0f} GB/s"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
