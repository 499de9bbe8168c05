"""Owns the report in words: Markdown that a terminal shows as well, with all that qualifies a figure."""

from . import summary
from .roofline import Work
from .summary import Cell, Range

COLUMNS = (
    "server",
    "output tok/s",
    "to the best peer",
    "total tok/s",
    "TTFT ms p50 / p99",
    "ITL ms p50 / p99 / max",
    "MiB",
    "ready s",
    "of bandwidth",
    "of int8 peak",
)


def render(result: dict) -> str:
    """All of a result."""
    table = summary.cells(result["samples"], result["typical"])
    parts = [_head(result), _contenders(result)]
    parts += [_load(result, table, load) for load in result["loads"]]
    parts += [_headlines(result, table), _left_out(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(result: dict) -> str:
    typical, num_weights = result["typical"], result["num_layer_weights"] + result["num_head_weights"]
    limits = [
        f"{_number(typical.get(key))} {words}"
        for key, words in (
            ("read_gb_per_s", "GB/s read"),
            ("fp32_gflops", "GFLOP/s fp32"),
            ("int8_vnni_gops", "GOP/s int8 (VNNI)"),
            ("int8_amx_gops", "GOP/s int8 (AMX)"),
        )
    ]
    return (
        f"Model {result['model']}: {num_weights / 1e6:.0f} M weights a token. {result['machine']}, "
        f"{result['threads']} threads, {result['date']}.\n"
        f"Limits, median of {len(result['probes'])} probes: {', '.join(limits)}.\n"
        f"{result['rounds']} rounds, servers in turns; median (lowest to highest). Prefix caches and "
        "speculation off, end-of-sequence ignored, greedy, first request of each stream dropped."
    )


def _contenders(result: dict) -> str:
    lines = [["server", "bits a weight", "KV cache", "KL to fp32", "same first choice", "settings"]]
    for name, row in result["contenders"].items():
        if "error" in row:
            lines.append([name, f"not available: {row['error'].strip().splitlines()[-1]}", "", "", "", ""])
            continue
        settings = " ".join(f"{key} {value}" for key, value in row["settings"].items())
        kl = f"{row['kl']:.4f} ± {row['kl_error']:.4f}" if "kl" in row else row.get("kl_missing", "-")
        same = f"{100 * row['same_first']:.0f} %" if "kl" in row else "-"
        lines.append([name, f"{row['bits']:.2f}", row["kv_dtype"], kl, same, settings])
    return _markdown(lines)


def _load(result: dict, table: dict[tuple[str, str], Cell], load: str) -> str:
    best_peer = max(
        (
            cell.figures["output"].median
            for (name, of), cell in table.items()
            if of == load and not result["contenders"][name]["is_ours"] and cell.figures["output"]
        ),
        default=None,
    )
    lines, notes = [list(COLUMNS)], []
    for (name, of), cell in table.items():
        if of != load:
            continue
        lines.append(_row(result, load, name, cell, best_peer))
        if cell.num_dropped:
            notes.append(f"{name}: {cell.num_dropped} rounds in another machine state were dropped.")
        if cell.is_noisy:
            notes.append(f"{name}: every round ran in another machine state; all were kept. Noisy.")
        notes += [f"{name}: {fault}" for fault in cell.faults]
    body = _markdown(lines) + ("\n\n" + "\n".join(notes) if notes else "")
    return f"**{load}**\n\n{body}"


def _row(result: dict, load: str, name: str, cell: Cell, best_peer: float | None) -> list[str]:
    figures, typical, row = cell.figures, result["typical"], result["contenders"][name]
    output, total = figures["output"], figures["total"]
    work = Work(result["num_layer_weights"], result["num_head_weights"], row["bits"])
    bandwidth = arithmetic = "-"
    if output and total:
        if load == "1 streams" and typical["read_gb_per_s"]:
            bandwidth = _percent(work.bandwidth_share(output.median, typical["read_gb_per_s"]))
        if typical["int8_vnni_gops"]:
            share = work.arithmetic_share(output.median, total.median, typical["int8_vnni_gops"])
            arithmetic = _percent(share)
    ratio = f"{output.median / best_peer:.2f}" if output and best_peer else "-"
    return [
        name + (" (noisy)" if cell.is_noisy else ""),
        _range(output),
        ratio,
        _median(total),
        _joined(figures, "ttft_p50", "ttft_p99"),
        _joined(figures, "itl_p50", "itl_p99", "itl_max"),
        _median(figures["memory"]),
        _number(figures["ready"].median if figures["ready"] else None),
        bandwidth,
        arithmetic,
    ]


def _headlines(result: dict, table: dict[tuple[str, str], Cell]) -> str:
    lines = []
    for headline in summary.headlines(result, table):
        if headline.refused:
            lines.append(f"{headline.ours} beside {headline.peer}: no headline, {headline.refused}.")
        elif headline.ratios:
            ratios = ", ".join(f"{ratio:.2f} x at {load}" for load, ratio in headline.ratios.items())
            lines.append(f"{headline.ours} beside {headline.peer}, output: {ratios}.")
    return "\n".join(lines)


def _left_out(result: dict) -> str:
    return "\n".join(f"Left out: {name}: {why}." for name, why in result["left_out"].items())


def _markdown(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def _range(value: Range | None) -> str:
    if value is None:
        return "-"
    spread = f" ({value.low:.0f} to {value.high:.0f})" if value.low != value.high else ""
    return _number(value.median) + spread


def _joined(figures: dict[str, Range | None], *names: str) -> str:
    return " / ".join(_median(figures[name]) for name in names)


def _median(value: Range | None) -> str:
    return "-" if value is None else _number(value.median)


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,.1f}" if abs(value) < 10 else f"{value:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
