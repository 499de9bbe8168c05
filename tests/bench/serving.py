"""Owns servers for measurements: started on a free port, ended with the block that holds them."""

import contextlib
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator


@contextlib.contextmanager
def serve(arguments: list[str]) -> Iterator[str]:
    """A server with these options: its address, once it is ready."""
    with serve_process("target/release/glmserve", arguments) as (url, _):
        yield url


@contextlib.contextmanager
def serve_process(program: str, arguments: list[str]) -> Iterator[tuple[str, int]]:
    """A server of this program with these options: its address and its process id, once it is ready."""
    command = [program, "serve", "--port", "0", "--log-format", "json", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = None
            for line in process.stderr:
                address = address or re.search(r"127\.0\.0\.1:\d+", line)
                if '"ready"' in line:
                    # Nobody reads the rest; a full pipe would stop the server.
                    threading.Thread(target=process.stderr.read, daemon=True).start()
                    yield f"http://{address[0]}", process.pid
                    return
            raise SystemExit(f"{' '.join(command)} ended")
        finally:
            process.terminate()


def counter(url: str, name: str) -> int:
    """A counter of the server's metrics."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    return int(re.search(rf"^{name} (\d+)", text, re.M)[1])
