"""Owns how an exported folder appears: whole or not at all, whatever kills the export on its way.

Invariant: everything is written into one temporary folder beside the destination, which a lock shows to be in
use; the destination's name is given by a rename, after the last byte.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glm_export.error import ExportError


@contextmanager
def output_folder(out: Path, force: bool, marker: str) -> Iterator[Path]:
    """A folder that becomes `out` on success and vanishes on failure.

    What `out` held before is replaced only if it was made here, which the file `marker` shows: a
    mistyped path must not cost somebody a folder.
    """
    # A link would be renamed instead of what it points to.
    out = out.resolve()
    # Beside `out`, since a rename is atomic only within one file system. One name, so that the next export
    # finds what a killed one left.
    temporary = out.with_name(f".{out.name}.exporting")
    replaced = out.with_name(f".{out.name}.replaced")
    lock = _claim(out, temporary)
    try:
        _restore(out, replaced)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not (out / marker).is_file():
                raise ExportError(f"{out} exists and was not made by this program: remove it yourself")
            if not force:
                raise ExportError(f"{out} exists; --force replaces it")
        yield temporary
        if out.exists():
            # Aside first: what was there is gone only when the new folder stands in its place.
            out.rename(replaced)
        temporary.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuses to begin what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ExportError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, and the export needs {num_bytes / 1e9:.2f} GB"
        )


def _restore(out: Path, replaced: Path) -> None:
    """Takes back the older of two folders if an export was killed while it exchanged them."""
    if not replaced.is_dir():
        return
    if out.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(out)
        print(f"{out} is back: an export was killed while it replaced the folder", file=sys.stderr)


def _claim(out: Path, temporary: Path) -> int:
    """Makes the temporary folder, empty and ours alone; returns the lock, which ends with the process."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY)
    except OSError as error:
        raise ExportError(f"{out}: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its owner may have finished between our two calls, and what we locked is its result.
        if not temporary.exists() or not os.path.samestat(os.fstat(lock), temporary.stat()):
            raise BlockingIOError
    except BlockingIOError:
        os.close(lock)
        raise ExportError(f"{out}: another export is writing it ({temporary})") from None
    except OSError:
        # A file system without locks cannot tell.
        pass
    left = list(temporary.iterdir())
    if left:
        num_bytes = sum(path.stat().st_size for path in left)
        print(f"removing what a killed export left: {temporary}, {num_bytes / 1e9:.2f} GB", file=sys.stderr)
        for path in left:
            path.unlink()
    return lock
