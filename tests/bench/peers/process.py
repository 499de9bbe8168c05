"""Owns a server process: on a free port, watched until ready, gone with its children at the end.

Invariant: leaving the `with` block leaves no process behind, whatever happened inside.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from .unavailable import Unavailable

LOG_TAIL_LINES = 15


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running server."""

    def __init__(self, command: list, environment: dict, port: int, ready_path: str, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._ready_url = self.url + ready_path
        self._command = [str(part) for part in command]
        self._environment = os.environ | environment
        self.ready_s = 0.0

    def __enter__(self) -> "Server":
        with self.log.open("w") as log:
            # A session of its own: its children can be ended with it.
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        for signal_number, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)
        # Its group may outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait_ready(self, timeout_s: float) -> None:
        """Returns when it says that it can serve."""
        started = time.monotonic()
        while time.monotonic() - started < timeout_s:
            if self.process.poll() is not None:
                raise Unavailable(f"exited with {self.process.returncode}: {self.log_tail()}")
            if self._answers():
                self.ready_s = time.monotonic() - started
                return
            time.sleep(0.02)
        raise Unavailable(f"not ready after {timeout_s:.0f} s: {self.log_tail()}")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self._ready_url, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def log_tail(self) -> str:
        """The end of what it wrote."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def memory_mib(self) -> float:
        """Resident memory of the whole session; what processes share is counted once."""
        return sum(map(_proportional_mib, _session(self.process.pid)))


def _session(leader: int) -> list[int]:
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may hold spaces; state, parent, group and session come after it.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                pids.append(int(entry.name))
    return pids


def _proportional_mib(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0
