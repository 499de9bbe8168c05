"""Owns what a log file is told of a long export."""

import io

from glm_export import progress


def test_lines_come_at_intervals_with_bytes_and_time_left():
    now, stream = [100.0], io.StringIO()
    lines = progress._Lines("weights", 4_000_000_000, stream, lambda: now[0])
    for second in range(1, 31):
        now[0] = 100.0 + second
        lines.advance(f"tensor.{second}", 100_000_000)
    assert stream.getvalue().splitlines() == [
        "weights: 1.00 of 4.00 GB, 30 s left, tensor.10",
        "weights: 2.00 of 4.00 GB, 20 s left, tensor.20",
        "weights: 3.00 of 4.00 GB, 10 s left, tensor.30",
    ]


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(progress, "DELAY_S", 0)
    stream = Terminal()
    with progress.phase("weights", 2000, stream) as advance:
        advance("layers.3.down", 1000)
        advance("layers.4.qkv", 1000)
    assert "weights" in stream.getvalue()
    assert "2.00k" in stream.getvalue()


def test_what_is_quick_says_nothing():
    stream = io.StringIO()
    with progress.phase("weights", 2000, stream) as advance:
        advance("layers.3.down", 2000)
    assert stream.getvalue() == ""
