"""What of `make bench-peers` needs no other server: rules, forms of the weights, reports, one whole turn."""

import json
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import ROOT
from glm_export.dev import tiny

sys.path.insert(0, str(ROOT / "tests" / "bench"))

from peers import (
    divergence,
    gguf_file,
    loads,
    machine,
    models,
    picture,
    roofline,
    summary,
    table,
    tune,
    vocabulary,
    w8a8,
)
from peers.glmserve import Glmserve
from peers.process import Server, free_port
from peers.rounds import Bench
from peers.unavailable import Unavailable

VOCAB = 2048
SHAPE = tiny.Shape(2, 256, 2, 2, 128, 384, padded_vocab_size=VOCAB)


def state(read, vnni=1900.0):
    return {"read_gb_per_s": read, "fp32_gflops": 400.0, "int8_vnni_gops": vnni, "int8_amx_gops": None}


def sample(contender, output, reads=(40.0, 40.0), **more):
    times = {"p50": 10.0, "p99": 20.0, "max": 30.0}
    run = {"output_tokens_per_s": output, "total_tokens_per_s": 3 * output, "ttft_ms": times, "itl_ms": times}
    run |= dict.fromkeys(summary.BROKEN, 0) | more
    probes = [state(read) for read in reads]
    return {"contender": contender, "load": "1 streams", "probes": probes, "run": run, "ready_s": 2.0} | {
        "memory_mib": 500.0
    }


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    models.write_random(folder / "checkpoint", SHAPE)
    return models.Model("m", folder, folder / "checkpoint", models.config.load(folder / "checkpoint"))


def result(samples):
    probes = [probe for one in samples for probe in one["probes"]]
    ours, peer = {"is_ours": True, "bits": 4.25}, {"is_ours": False, "bits": 4.5}
    common = {"kv_dtype": "float16", "settings": {"-np": 16}, "kl_error": 0.001, "same_first": 0.9}
    return {
        "model": "m",
        "machine": "a <processor>",
        "threads": 2,
        "date": "2026-01-01",
        "num_layer_weights": 300_000_000,
        "num_head_weights": 50_000_000,
        "rounds": 3,
        "contenders": {
            "glmserve int4": ours | common | {"kl": 0.05},
            "good peer": peer | common | {"kl": 0.04},
            "poor peer": peer | common | {"kl": 0.06},
            "absent peer": {"is_ours": False, "error": "no compiler\nfor it"},
        },
        "left_out": {"another": "of a reason"},
        "loads": ["1 streams"],
        "probes": probes,
        "typical": machine.medians(probes),
        "samples": samples,
    }


def test_rounds_in_another_state_are_dropped_and_counted():
    samples = [sample("a", 100), sample("a", 104), sample("a", 300, reads=(40.0, 70.0))]
    typical = machine.medians([probe for one in samples for probe in one["probes"]])
    assert typical == state(40.0)
    cell = summary.cells(samples, typical)["a", "1 streams"]
    assert (cell.num_kept, cell.num_dropped, cell.is_noisy) == (2, 1, False)
    assert cell.figures["output"] == summary.Range(102, 100, 104)
    # Just inside the tolerance, and just outside; half the arithmetic is another state as well.
    assert not machine.is_off([state(40 * 1.149)], typical)
    assert machine.is_off([state(40 * 0.849)], typical)
    assert machine.is_off([state(40.0, vnni=966.0)], typical)
    noisy = summary.cells([sample("b", 7, reads=(3.0, 3.0))], typical)["b", "1 streams"]
    assert (noisy.num_kept, noisy.num_dropped, noisy.is_noisy) == (1, 0, True)


def test_a_probe_without_vector_instructions_judges_by_bandwidth_alone():
    plain = dict.fromkeys(state(1.0), None) | {"read_gb_per_s": 10.0}
    assert not machine.is_off([plain], machine.medians([plain, plain]))
    assert machine.is_off([plain | {"read_gb_per_s": 12.0}], machine.medians([plain, plain]))


def test_broken_streams_and_failed_rounds_stand_beside_the_figures():
    failed = {"contender": "a", "load": "1 streams", "probes": [], "error": "exited with 1: no memory"}
    cell = summary.cells([sample("a", 100, num_short=2), failed], state(40.0))["a", "1 streams"]
    assert cell.faults == ["exited with 1: no memory", "2 short"]
    assert cell.num_kept == 1
    nothing = summary.cells([failed], state(40.0))["a", "1 streams"]
    assert nothing.figures["output"] is None


def test_a_headline_needs_a_divergence_that_is_no_worse():
    samples = [sample("glmserve int4", 150), sample("good peer", 100), sample("poor peer", 120)]
    found = result(samples)
    refused, told = summary.headlines(found, summary.cells(samples, found["typical"]))
    assert (refused.peer, refused.refused) == ("good peer", "KL 0.0500 is worse than 0.0400")
    assert (told.peer, told.refused, told.ratios) == ("poor peer", None, {"1 streams": 1.25})


def test_the_report_says_it_all_in_words_and_as_a_picture():
    samples = [sample("glmserve int4", 150), sample("good peer", 100), sample("poor peer", 120)]
    samples.append(sample("poor peer", 900, reads=(70.0, 70.0)))
    found = result(samples)
    text = table.render(found)
    print(text)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "| 150 " in rows["glmserve int4"]
    # 1.25 of the best peer; 350 M weights of 4.25 bits, 150 times a second, of 40 GB/s.
    assert "| 1.25 " in rows["glmserve int4"]
    assert "| 70 % " in rows["glmserve int4"]
    assert "not available: for it" in rows["absent peer"]
    assert "poor peer: 1 rounds in another machine state were dropped." in text
    assert "glmserve int4 beside good peer: no headline" in text
    assert "glmserve int4 beside poor peer, output: 1.25 x at 1 streams." in text
    assert "Left out: another: of a reason." in text
    svg = ElementTree.fromstring(picture.render(found))
    bars = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert bars[0] == "glmserve int4, 1 streams: 150.0"
    assert len(bars) == 6
    empty = result([]) | {"loads": [], "typical": {}}
    assert table.render(empty)
    ElementTree.fromstring(picture.render(empty))


def test_divergence_is_zero_for_the_same_and_known_for_another():
    exact = np.log([[0.5, 0.5], [0.9, 0.1]])
    same = divergence.compare(exact, exact)
    assert (same["kl"], same["same_first"]) == (0.0, 1.0)
    other = divergence.compare(exact, np.log([[0.25, 0.75], [0.9, 0.1]]))
    expected = 0.5 * (0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert other["kl"] == pytest.approx(expected)


def test_roofline_shares():
    work = roofline.Work(num_layer_weights=900, num_head_weights=100, bits_per_weight=8.0)
    assert work.bandwidth_share(1e6, read_gb_per_s=2.0) == pytest.approx(0.5)
    # 2 x (900 x 3 + 100 x 1) operations a microsecond.
    assert work.arithmetic_share(1e6, 3e6, giga_ops_per_s=5.6) == pytest.approx(1.0)


def test_loads_become_arguments_of_the_generator():
    closed, mixed, opened = loads.choose([4], [0.5], 8, is_quick=False)
    assert " ".join(closed.arguments()) == (
        "--streams 4 --requests-per-stream 8 --prompt-tokens 128 --max-tokens 64,96,128"
    )
    assert "128,1024" in mixed.arguments()
    assert opened.arguments()[:4] == ["--rates", "0.5", "--arrivals", "64"]


def test_every_word_of_the_generator_is_one_token():
    found = vocabulary.tokenizer(VOCAB)
    words = vocabulary.bench_words()
    text = "".join(" " + word for word in words)
    assert found.encode(text).tokens == [vocabulary.SPACE + word for word in words]
    assert found.decode(found.encode(text).ids) == text
    tokens, merges = vocabulary.build(VOCAB)
    assert len(set(tokens)) == VOCAB
    assert {start + letter for start, letter in merges} <= set(tokens)


def test_the_gguf_holds_the_checkpoint_in_float32(random_model):
    path = gguf_file.source(random_model)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    source = models.Checkpoint(random_model.checkpoint)
    prefix = "transformer.encoder.layers.1."
    for name, of in (
        ("blk.1.attn_qkv.weight", f"{prefix}self_attention.query_key_value.weight"),
        ("blk.1.ffn_up.weight", f"{prefix}mlp.dense_h_to_4h.weight"),
        ("output.weight", "transformer.output_layer.weight"),
    ):
        np.testing.assert_array_equal(tensors[name].data, source[of].rows())
    assert len(tensors) == 3 + 2 * 7
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == VOCAB
    assert gguf_file.bits_per_weight(path) == 32


def test_w8a8_keeps_a_scale_a_row(random_model, tmp_path):
    w8a8.write(random_model, tmp_path / "w8a8")
    name = "transformer.encoder.layers.0.self_attention.dense.weight"
    from safetensors.numpy import load_file

    found = load_file(tmp_path / "w8a8" / "model.safetensors")
    exact = models.Checkpoint(random_model.checkpoint)[name].rows()
    back = found[name] * found[f"{name}_scale"]
    assert found[name].dtype == np.int8
    assert (np.abs(back - exact) <= found[f"{name}_scale"] * 0.501).all()
    assert found["transformer.output_layer.weight"].dtype == np.float32


def test_a_server_that_dies_is_told_with_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-c", "print('no such weights'); raise SystemExit(3)"]
    with (
        Server(command, {}, free_port(), "/health", tmp_path / "log") as server,
        pytest.raises(Unavailable, match="exited with 3: no such weights"),
    ):
        server.wait_ready(30)


# Prints its process id when SIGTERM does nothing to it any more.
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"


def test_a_server_ends_with_its_children(tmp_path):
    """A child that ignores SIGTERM and outlives its parent ends with the session."""
    log = tmp_path / "log"
    with Server([sys.executable, "-c", PARENT, STUBBORN], {}, free_port(), "/health", log) as server:
        assert server.process.wait(30) == 0
        wait_until(lambda: log.read_text().endswith("\n"))
        pid = int(log.read_text())
        assert is_running(pid)
    wait_until(lambda: not is_running(pid))


def is_running(pid):
    try:
        # The name, in parentheses, may hold spaces; a zombie waits for its parent only.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(is_true, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class Broken(Glmserve):
    """One whose weights cannot be made."""

    def prepare(self, model):
        raise Unavailable("no weights")


class Dying(Glmserve):
    """One whose server does not start."""

    def command(self, model, port, settings):
        return [sys.executable, "-c", "raise SystemExit('out of luck')"]


def test_who_cannot_run_is_in_the_report_with_the_reason(random_model, tmp_path):
    bench = Bench(random_model, [Broken("fp32"), Dying("int8", 64)], tmp_path)
    bench.prepare({}, with_divergence=False)
    bench.run([loads.Load("1 streams", 1, None, (16,), (4,), 1)], rounds=1)
    text = (tmp_path / "peers-m.md").read_text()
    assert "not available: no weights" in text
    assert "glmserve int8 b64: exited with 1: out of luck" in text
    assert [sample["contender"] for sample in bench.result["samples"]] == ["glmserve int8 b64"]


def test_one_turn_of_our_own_server_makes_a_whole_report(random_model, tmp_path):
    contender = Glmserve("int8", 64)
    bench = Bench(random_model, [contender], tmp_path)
    bench.prepare(tune.read(random_model), with_divergence=True)
    chosen = [
        loads.Load("2 streams", 2, None, (16, 24), (4, 6), 2),
        loads.Load("50 requests/s", None, 50.0, (16,), (4,), 4),
    ]
    bench.run(chosen, rounds=2)
    found = json.loads((tmp_path / "peers-m.json").read_text())
    assert [s["run"]["num_ok"] for s in found["samples"]] == [4, 4] * 2
    assert all(s["run"]["num_short"] == 0 for s in found["samples"])
    # A word a token: with the template's tokens each prompt has what was asked for.
    assert found["samples"][0]["run"]["prompt_tokens_mean"] == 20
    assert found["samples"][1]["run"]["prompt_tokens_mean"] == 16
    row = found["contenders"]["glmserve int8 b64"]
    assert 8 < row["bits"] < 9
    assert 0 < row["kl"] < 0.1
    assert found["samples"][0]["memory_mib"] > 10
    assert "**2 streams**" in (tmp_path / "peers-m.md").read_text()
    ElementTree.fromstring((tmp_path / "peers-m.svg").read_text())
