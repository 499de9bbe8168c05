"""Owns `make gpu-check`: numbers and speed on a machine with a GPU, in steps that can be run again.

    gpu_check.py --work DIR [--provider cuda|cpu] [--layers N ...] [--redo STEP]

Each program that a step runs is cut off after STEP_SECONDS. A step leaves its result in DIR/state.json; what
is there is not run again, so a lease that ends is taken up where it was. Weights are random and made on the
spot. `--provider cpu` runs the very same steps without a GPU; `--ignore-numbers` is for the double of the
CUDA libraries, whose numbers mean nothing.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from glm_export import cli
from glm_export.dev import full_size, tiny
from glm_export.error import ExportError
from glm_export.graph import manifest
from glm_export.verify import check
from glm_export.verify.known_answer import KNOWN_ANSWER_FILE

ROOT = Path(__file__).resolve().parents[2]
STEP_SECONDS = 470
PRECISIONS = {"cuda": ("fp16", "fp8", "int8", "int4", "bf16"), "cpu": ("fp32", "int8", "int4")}
# Heads as CUDA's attention wants them; one shape has ChatGLM3's own, over a block's border.
SHAPES = {
    "small": tiny.Shape(head_dim=32),
    "wide": tiny.Shape(num_layers=3, hidden_size=256, num_kv_heads=2, head_dim=128, ffn_size=384),
}
VOCAB_SIZE = 65_024
NUM_GREEDY = 24
NUM_DECODED = 140
# Median milliseconds to the first token; tokens a second of replies once they run, and with all before.
SPEEDS = ("first_token_ms", "decode", "output")
SPREAD = "spread"


class Run:
    """What the steps share: options, folders and results."""

    def __init__(self, options):
        self.options = options
        self.work = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.state_file = self.work / "state.json"
        # Results of other weights or of another provider are no results.
        self.key = [options.provider, options.layers, options.hidden_size, options.prompt_tokens]
        state = json.loads(self.state_file.read_text()) if self.state_file.is_file() else {}
        if state and state["key"] != self.key:
            sys.exit(f"{self.state_file} is of {state['key']}, not of {self.key}: choose another --work")
        self.results = state.get("results", {})

    def steps(self):
        """Name and function of every step, the most useful first; later ones need what earlier ones wrote.

        So a lease of half an hour gives the machine's limits, and logits and speeds of the first precision.
        """
        is_gpu = self.options.provider == "cuda"
        if is_gpu and not self.options.ignore_numbers:
            yield "limits", limits
        for shape in SHAPES:
            yield f"reference/{shape}", lambda shape=shape: self.write_reference(shape)
        for rank, precision in enumerate(PRECISIONS[self.options.provider]):
            for shape in SHAPES:
                yield f"numbers/{shape}/{precision}", lambda s=shape, p=precision: self.numbers(s, p)
            if rank == 0:
                yield "weights", self.write_weights
            yield f"export/{precision}", lambda p=precision: self.export(p)
            yield f"speed/{precision}", lambda p=precision: self.speed(p)
        if is_gpu:
            for precision in PRECISIONS[self.options.provider]:
                yield f"speed/{precision}, eager", lambda p=precision: self.speed(p, "--enforce-eager")

    def run(self):
        """Runs what has no result yet; True if no step failed."""
        is_good = True
        for name, step in self.steps():
            if name in self.results and not any(name.startswith(redo) for redo in self.options.redo):
                continue
            started = time.monotonic()
            try:
                result = step()
            except (ExportError, OSError, subprocess.SubprocessError, AssertionError) as error:
                # Kept for the table, and not in the state: the next run tries again.
                print(f"{name}: FAILED: {error}", flush=True)
                is_good = False
                continue
            self.results[name] = result
            temporary = self.state_file.with_suffix(".new")
            temporary.write_text(json.dumps({"key": self.key, "results": self.results}, indent=1))
            temporary.rename(self.state_file)
            print(f"{name}: {time.monotonic() - started:.1f} s {json.dumps(result)}", flush=True)
        return is_good

    def write_reference(self, shape):
        """A checkpoint, and what transformers makes of a sequence and of a greedy reply."""
        import torch

        folder = fresh(self.work / shape)
        tiny.write(folder / "checkpoint", SHAPES[shape], seed=11)
        ids = np.random.default_rng(0).integers(0, 480, 200).tolist()
        (folder / "ids.json").write_text(json.dumps(ids))
        np.save(folder / "logits.npy", check.reference_logits(folder / "checkpoint", ids))
        model = check.reference_model(folder / "checkpoint")
        overrides = json.loads((folder / "checkpoint" / "glm_export.json").read_text())
        special, vocab_size = overrides["chat"]["special_tokens"], overrides["vocab_size"]
        turn = [special["[gMASK]"], special["sop"], special["<|user|>"], *ids[:20], special["<|assistant|>"]]
        reply = []
        with torch.no_grad():
            while len(reply) < NUM_GREEDY:
                logits = model(torch.tensor([turn + reply])).logits[0, -1, :vocab_size]
                reply.append(int(logits.argmax()))
        turns = {"turn": turn, "reply": reply, "vocab_size": vocab_size}
        (folder / "reply.json").write_text(json.dumps(turns))
        return {"tokens": len(ids), "reply": len(reply)}

    def numbers(self, shape, precision):
        """Logits as a prompt and token by token, and a greedy reply, against the reference."""
        folder = self.work / shape
        model = folder / precision
        self.export_to(folder / "checkpoint", model, precision)
        ids = json.loads((folder / "ids.json").read_text())
        found, expected = self.logits(model, ids), np.load(folder / "logits.npy")
        decoded = self.logits(model, ids[:NUM_DECODED], "--chunk", "1")
        turns = json.loads((folder / "reply.json").read_text())
        turn, reply = turns["turn"], turns["reply"]
        rows = self.logits(model, turn + reply, "--chunk", "1")[len(turn) - 1 : -1, : turns["vocab_size"]]
        same = int((rows.argmax(axis=-1) == reply).sum())
        if self.options.provider == "cuda":
            eager = self.logits(model, ids[:NUM_DECODED], "--chunk", "1", "--enforce-eager")
        if self.options.ignore_numbers:
            return {"prompt": "ignored", "decode": "ignored", "same_greedy": "ignored"}
        if self.options.provider == "cuda":
            # Fails where it is off; not bit by bit, as frozen bounds may split attention otherwise.
            check.difference(eager, expected[:NUM_DECODED], precision)
        return {
            "prompt": str(check.difference(found, expected, precision)),
            "decode": str(check.difference(decoded, expected[:NUM_DECODED], precision)),
            "same_greedy": f"{same}/{NUM_GREEDY}",
        }

    def logits(self, model, ids, *more):
        """The engine's own logits of every position."""
        out = self.work / "found.npy"
        command = [self.options.glmserve, "logits", "--model", model, "--out", out, *more]
        command += ["--ids", ",".join(map(str, ids)), "--kv-cache-memory", "64"]
        subprocess.run(command, check=True, timeout=STEP_SECONDS)
        return np.load(out)

    def write_weights(self):
        """Random weights of ChatGLM3-6B's layers, as many as were asked for."""
        folder = fresh(self.work / "weights")
        size = self.options.hidden_size
        shape = tiny.Shape(
            num_layers=self.options.layers,
            hidden_size=size,
            num_attention_heads=size // 128,
            num_kv_heads=2,
            head_dim=128,
            ffn_size=size * 107 // 32 // 32 * 32,
            seq_length=8192,
            padded_vocab_size=VOCAB_SIZE,
        )
        full_size.write(folder / "checkpoint", shape=shape)
        num_bytes = sum(file.stat().st_size for file in (folder / "checkpoint").iterdir())
        return {"layers": shape.num_layers, "hidden_size": size, "bytes": num_bytes}

    def export(self, precision):
        """The folder that the speed of a precision is measured with."""
        folder = self.work / "weights"
        self.export_to(folder / "checkpoint", folder / precision, precision)
        if self.options.ignore_numbers:
            forget_known_answer(folder / precision)
        return {"bytes": (folder / precision / "model.onnx.data").stat().st_size}

    def speed(self, precision, *more):
        """Prompts and replies a second at each number of streams, of one server, twice."""
        model = self.work / "weights" / precision
        report = self.work / f"{precision}{''.join(more)}.json"
        rounds = []
        with self.server(model, *more) as url:
            command = [self.options.glmserve, "bench", "--base-url", url]
            command += ["--streams", ",".join(map(str, self.options.rows))]
            command += ["--prompt-tokens", str(self.options.prompt_tokens), "--json", report]
            command += ["--max-tokens", str(self.options.max_tokens), "--requests-per-stream", "3"]
            # The double's replies are empty, which the bench counts as broken.
            is_real = not self.options.ignore_numbers
            for _ in range(2 if is_real else 1):
                subprocess.run(command, check=is_real, timeout=STEP_SECONDS, stdout=subprocess.DEVNULL)
                rounds.append(json.loads(report.read_text())["runs"])
        if not is_real:
            return {str(rows): dict.fromkeys([*SPEEDS, SPREAD], "ignored") for rows in self.options.rows}
        columns = zip(self.options.rows, *rounds, strict=True)
        return {str(rows): twice(*(speeds(rows, run) for run in runs)) for rows, *runs in columns}

    def share(self, precision, rows, decode):
        """Of the memory's bandwidth that decodes need if products' weights are read once a step."""
        if "limits" not in self.results or decode == "ignored":
            return "-"
        # A step reads a few rows of the embedding, which is as large as the head.
        num_bytes = self.results[f"export/{precision}"]["bytes"] - 2 * VOCAB_SIZE * self.options.hidden_size
        return f"{num_bytes * decode / int(rows) / 1e9 / self.results['limits']['read_gb_per_s']:.0%}"

    def export_to(self, checkpoint, out, precision):
        cli.export(checkpoint, out, precision, provider=self.options.provider, force=True)

    @contextlib.contextmanager
    def server(self, model, *more):
        """A server on a free port, stopped afterwards; its address."""
        log = self.work / "server.log"
        command = [self.options.glmserve, "serve", "--model", model, "--port", "0", "--log-format", "json"]
        if self.options.kv_cache_memory is not None:
            command += ["--kv-cache-memory", str(self.options.kv_cache_memory)]
        command += ["--max-num-seqs", str(max(128, *self.options.rows)), *more]
        # Random weights fall into loops, which are drafted: that is no speed of the GPU's.
        command += ["--speculative-tokens", "0"]
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield self.wait_ready(process, log)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()

    def wait_ready(self, process, log):
        deadline = time.monotonic() + STEP_SECONDS / 2
        while time.monotonic() < deadline:
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
            messages = [line.get("fields", {}) for line in lines]
            if any(fields.get("message") == "ready" for fields in messages):
                return f"http://{next(fields['address'] for fields in messages if 'address' in fields)}"
            assert process.poll() is None, f"the server ended: {log.read_text()[-600:]}"
            time.sleep(0.1)
        raise AssertionError(f"the server is not ready: {log.read_text()[-600:]}")

    def table(self):
        """All results, for people."""
        lines = ["| model | precision | prompt, against transformers | decode | same greedy tokens |"]
        lines.append("|---|---|---|---|---|")
        for name, result in self.results.items():
            kind, *rest = name.split("/")
            if kind == "numbers":
                lines.append(f"| {' | '.join([*rest, *result.values()])} |")
        lines += ["", f"limits: {json.dumps(self.results.get('limits', 'not measured'))}", ""]
        lines.append(
            "| precision | streams | first token ms | decode tokens/s | output tokens/s | spread | read |"
        )
        lines.append("|---|---|---|---|---|---|---|")
        for name, result in self.results.items():
            kind, how = name.split("/")[0], name.split("/")[-1]
            for rows, found in result.items() if kind == "speed" else ():
                share = self.share(how.split(",")[0], rows, found["decode"])
                lines.append(f"| {' | '.join([how, rows, *map(str, found.values()), share])} |")
        return "\n".join(lines)


def speeds(rows, run):
    """A run of the bench in SPEEDS."""
    found = (
        run["ttft_ms"]["p50"],
        rows / run["tpot_ms"]["p50"] * 1000,
        run["output_tokens_per_s"],
    )
    return dict(zip(SPEEDS, (round(speed, 1) for speed in found), strict=True))


def twice(first, second):
    """The mean of two measurements, and by how much of it their outputs differ."""
    found = {name: round((first[name] + second[name]) / 2, 1) for name in SPEEDS}
    apart = abs(first["output"] - second["output"]) / max(found["output"], 1e-9)
    return found | {SPREAD: f"{apart:.1%}"}


def limits():
    """What the GPU can do at best: bytes read a second, and products of large fp16 matrices."""
    import torch

    if not torch.cuda.is_available():
        raise ExportError("torch sees no GPU")
    data = torch.ones(2**30, dtype=torch.float32, device="cuda")
    out = torch.empty_like(data)
    square = torch.randn(8192, 8192, dtype=torch.float16, device="cuda")
    return {
        "gpu": torch.cuda.get_device_name(),
        "read_gb_per_s": round(2 * data.nbytes / seconds(lambda: out.copy_(data)) / 1e9),
        "fp16_tflop_per_s": round(2 * 8192**3 / seconds(lambda: square @ square) / 1e12),
    }


def seconds(work):
    """The least of ten times of work on the GPU."""
    import torch

    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times)


def forget_known_answer(folder):
    """Takes the answer out of a folder: a double computes nothing, and no server would start."""
    (folder / KNOWN_ANSWER_FILE).unlink()
    path = folder / manifest.MANIFEST_FILE
    content = json.loads(path.read_text())
    del content["files"][KNOWN_ANSWER_FILE]
    content["digest"] = manifest.digest(content["files"])
    path.write_text(manifest.to_text(content))


def fresh(folder):
    """An empty folder in the place of what a cut step left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Numbers and speed on this machine's GPU, step by step.")
    parser.add_argument("--work", type=Path, required=True, help="folder of weights, results and state.json")
    parser.add_argument("--provider", choices=PRECISIONS, default="cuda")
    parser.add_argument("--glmserve", default=ROOT / "target" / "release" / "glmserve", metavar="BINARY")
    parser.add_argument("--layers", type=int, default=28, help="of ChatGLM3-6B's size (%(default)s)")
    parser.add_argument("--hidden-size", type=int, default=4096, help="multiple of 256 (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--kv-cache-memory", type=int, metavar="MIB", help="of the server (its own default)")
    parser.add_argument("--redo", nargs="+", default=[], metavar="STEP", help="run steps that start so again")
    parser.add_argument("--ignore-numbers", action="store_true", help="for the test double of CUDA")
    options = parser.parse_args(arguments)
    if options.provider == "cuda" and "GLMSERVE_ORT_LIB" not in os.environ:
        sys.exit("GLMSERVE_ORT_LIB does not name onnxruntime-gpu's library: use `make gpu-check`")
    run = Run(options)
    is_good = run.run()
    print(run.table())
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
