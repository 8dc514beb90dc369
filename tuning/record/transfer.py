"""Single files of a run, fetched from a storage and sent there."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tuning.record import claim
from tuning.record.storage import Stored, joined, read_bytes, stored, write_bytes
from tuning.record.tables import replacing
from tuning.settings.config import InputError

PATIENCE_SECONDS = 300.0  # with a storage that fails, if nothing can continue without it
RETRY_SECONDS = 5.0
Answer = TypeVar("Answer")


def patiently(attempt: Callable[[], Answer], seconds: float | None = None) -> Answer:
    """Return what an attempt does, which is retried while the storage fails.

    Raises:
        OSError: it still fails after `seconds` (default: `PATIENCE_SECONDS`).
    """
    until = time.monotonic() + (PATIENCE_SECONDS if seconds is None else seconds)
    while True:
        try:
            return attempt()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(RETRY_SECONDS)


def newer_here(path: Path, there: Stored | None) -> bool:
    """Return whether a file here is at least as new as the one in the storage, if there is one."""
    return path.exists() and (there is None or path.stat().st_mtime_ns >= there.mtime_ns)


def fetch_file(folder: Path, uri: str, name: str, there: Stored) -> None:
    """Fetch a file, whatever is here; all that a run's folder gets from a storage comes this way.

    Raises:
        InputError: its name leads out of the folder.
    """
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise InputError(f"{uri}: holds a file {name!r}, whose name leads out of the run's folder; delete it")
    write_file(folder / name, read_bytes(joined(uri, name)), there.mtime_ns)


def fetch_files(folder: Path, uri: str, names: Sequence[str]) -> None:
    """Fetch the files that exist there: all of them, or none if the last one is newer here."""
    there = stored([joined(uri, name) for name in names])
    if newer_here(folder / names[-1], there[-1]):
        return
    for name, known in zip(names, there, strict=True):
        if known is not None:
            fetch_file(folder, uri, name, known)


def push_file(folder: Path, uri: str, name: str, driver: str | None) -> None:
    """Send a file there, for the driver with this claim (None if a run is only borrowed), if it still exists.

    Raises:
        InputError: another driver writes the run.
        OSError: the storage fails.
    """
    try:
        content = (folder / name).read_bytes()
    except FileNotFoundError:
        return
    claim.check_mine(uri, driver)
    write_bytes(joined(uri, name), content)


def write_file(path: Path, content: bytes, mtime_ns: int = 0) -> None:
    """Write a file with the time that the storage gives it, so that one clock dates all fetched files.

    A file that is made here has this machine's time, and is compared by two clocks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        if mtime_ns:
            os.utime(temporary, ns=(mtime_ns, mtime_ns))
