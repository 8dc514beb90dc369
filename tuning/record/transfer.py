"""Single files of a run, brought here from a storage and sent there."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from tuning.record import claim
from tuning.record.storage import Stored, joined, read_bytes, stored, write_bytes
from tuning.record.tables import replacing
from tuning.settings.config import InputError

PATIENCE_SECONDS = 300.0  # with a storage that fails, where nothing goes on without it
RETRY_SECONDS = 5.0
Answer = TypeVar("Answer")


def patiently(attempt: Callable[[], Answer], seconds: float | None = None) -> Answer:
    """What an attempt gives, which is made again and again while a storage fails.

    Raises:
        OSError: it fails for so many seconds, or `PATIENCE_SECONDS`.
    """
    until = time.monotonic() + (PATIENCE_SECONDS if seconds is None else seconds)
    while True:
        try:
            return attempt()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(RETRY_SECONDS)


def fetch_file(folder: Path, uri: str, name: str, there: Stored) -> bool:
    """Bring a file here, unless the one here is newer; says whether it was brought.

    Raises:
        InputError: its name leads out of the folder.
    """
    path = folder / name
    if path.exists() and path.stat().st_mtime_ns >= there.mtime_ns:
        return False
    bring(folder, uri, name, there)
    return True


def bring(folder: Path, uri: str, name: str, there: Stored) -> None:
    """Bring a file here, whatever is here; all that a run's folder gets from a storage comes this way.

    Raises:
        InputError: its name leads out of the folder.
    """
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise InputError(f"{uri}: holds a file {name!r}, whose name leads out of the run's folder; take it away")
    write_file(folder / name, read_bytes(joined(uri, name)), there.mtime_ns)


def fetch_files(folder: Path, uri: str, names: Iterable[str]) -> None:
    """Bring files here that are there: all of them, or none where the last of them is newer here."""
    names = list(names)
    there = stored([joined(uri, name) for name in names])
    last = folder / names[-1]
    newest = there[-1]
    if last.exists() and (newest is None or last.stat().st_mtime_ns >= newest.mtime_ns):
        return
    for name, known in zip(names, there, strict=True):
        if known is not None:
            bring(folder, uri, name, known)


def push_file(folder: Path, uri: str, name: str, driver: str | None) -> None:
    """Send a file there; one that has gone meanwhile is left out.

    Args:
        folder, uri: of the run.
        name: of the file, in both.
        driver: name of the claim for which it is sent; null where a run is only borrowed.

    Raises:
        InputError: another driver writes the run.
        OSError: the storage fails.
    """
    try:
        content = (folder / name).read_bytes()
    except FileNotFoundError:
        return
    if driver is not None:
        claim.check_mine(uri, driver)
    write_bytes(joined(uri, name), content)


def write_file(path: Path, content: bytes, mtime_ns: int = 0) -> None:
    """Write a file as old as the storage says it is, so that fetched files are told newer from older by one clock.

    A file that is made here has this machine's time, and is held against the storage's by two clocks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        if mtime_ns:
            os.utime(temporary, ns=(mtime_ns, mtime_ns))
