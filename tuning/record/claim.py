"""Which driver writes a run that lies in a storage, and the journal's segments, which are named after their drivers.

Each driver has a file in `drivers/`, its claim, which nobody else writes, so that no two can overwrite each other's.
Names begin with a count of the drivers, and the last one is the driver. One that was cut off for so long that another
has begun finds the other's name, and writes nothing more. All functions raise OSError if the storage fails.
"""

import json
import math
import os
import platform
import re
import uuid
from collections.abc import Iterable
from pathlib import Path

from tuning.record.storage import Stored, delete, files_below, joined, read_all, read_bytes, write_bytes
from tuning.settings.config import InputError

CLAIM_SECONDS = 60.0  # a driver that hasn't renewed its claim for this long has died
CLAIMS = "drivers/"
CLOCK = "now-"  # begins the names of files there that are written to learn the storage's time
CLOCK_TRIES = 3
SEGMENTS = "journal/"
_SEGMENT = re.compile(rf"{SEGMENTS}(?:\d+-\w+-(?P<begin>\d+)|\d+)\.jsonl")


def check_free(uri: str) -> None:
    """Refuse a run that another driver writes.

    A claim's age is the difference of two times of the storage, so no other clock matters.

    Raises:
        InputError: there is another driver, and it isn't known to have died.
    """
    there = _claims(uri)
    if not there:
        return
    last = max(there)
    file = joined(uri, f"{CLAIMS}{last}.json")
    try:
        driver = json.loads(read_bytes(file))
    except FileNotFoundError:  # it has just ended
        return
    here = driver["processes"] is not None and (driver["host"], driver["processes"]) == (platform.node(), _processes())
    if here and not Path(f"/proc/{driver['pid']}").exists():
        return
    if _now(uri) - there[last].mtime_ns >= CLAIM_SECONDS * 1e9:
        return
    wait = f"wait {CLAIM_SECONDS:.0f} s" if there[last].mtime_ns else f"delete {file}"  # some storages have no times
    raise InputError(
        f"{uri}: another search, on {driver['host']}, is writing this run; stop it, or, if it has crashed, {wait}"
    )


def take(uri: str) -> str:
    """Become the driver of a run; return the claim's name, which comes after those of all drivers before.

    Raises:
        InputError: another driver writes the run.
    """
    check_free(uri)
    before = [*_claims(uri), *files_below(joined(uri, SEGMENTS))]
    number = max((int(found[0]) for other in before if (found := re.match(r"\d+(?=-)", other))), default=0) + 1
    name = f"{number:04d}-{uuid.uuid4().hex[:16]}"
    _write(uri, name)
    check_mine(uri, name)
    return name


def check_mine(uri: str, name: str | None) -> None:
    """Refuse to write a run that a later driver than the claim's has written; without a claim (None) all may write.

    Raises:
        InputError: there is a later driver.
    """
    if name is None:
        return
    there = list(_claims(uri))
    if name not in there:  # a later driver that has ended left segments, but no claim
        there += [segment[: len(name)] for segment in files_below(joined(uri, SEGMENTS)) if "-" in segment]
    if max(there, default=name) > name:
        raise InputError(
            f"{uri}: another search has taken this run over; this one stops, and what it hasn't sent is discarded"
        )


def renew(uri: str, name: str) -> None:
    """Show that the driver lives.

    Raises:
        InputError: there is a later driver.
    """
    check_mine(uri, name)
    _write(uri, name)


def release(uri: str, name: str) -> None:
    """Delete a claim, and what drivers that were killed have left."""
    for left in files_below(joined(uri, CLAIMS)):
        if left.startswith(CLOCK) or (left.endswith(".json") and left.removesuffix(".json") <= name):
            delete(joined(uri, f"{CLAIMS}{left}"))


def segment(driver: str, begin: int) -> str:
    """Return the name of the segment of the journal that a driver begins at this byte."""
    return f"{SEGMENTS}{driver}-{begin:012d}.jsonl"


def segments_among(names: Iterable[str]) -> list[str]:
    """Return the segments among a run's files, in order: those of an older version, which counted them, come first."""
    found = [name for name in names if name.startswith(SEGMENTS) and name.endswith(".jsonl")]
    return sorted(found, key=lambda name: ("-" in name, name))


def read_segments(uri: str, names: list[str]) -> bytes:
    """Return the journal of these segments, without what a driver sent after another had taken the run over.

    Raises:
        InputError: a segment is missing.
    """
    journal = bytearray()
    for name, lines in zip(names, read_all([joined(uri, name) for name in names]), strict=True):
        named = _SEGMENT.fullmatch(name)
        begin = int(named["begin"] or len(journal)) if named else math.inf
        if begin > len(journal):
            raise InputError(f"{joined(uri, name)}: doesn't continue the journal; restore the segments before it")
        del journal[int(begin) :]
        journal += lines
    return bytes(journal)


def _claims(uri: str) -> dict[str, Stored]:
    there = files_below(joined(uri, CLAIMS))
    return {name.removesuffix(".json"): known for name, known in there.items() if name.endswith(".json")}


def _write(uri: str, name: str) -> None:
    claim = {"host": platform.node(), "pid": os.getpid(), "processes": _processes()}
    write_bytes(joined(uri, f"{CLAIMS}{name}.json"), json.dumps(claim).encode())


def _now(uri: str) -> int:
    """Return the storage's time in ns: that of a new file, which a driver that ends meanwhile may delete."""
    name = f"{CLOCK}{uuid.uuid4().hex}"
    try:
        for _ in range(CLOCK_TRIES):
            write_bytes(joined(uri, f"{CLAIMS}{name}"), b"now")
            written = files_below(joined(uri, CLAIMS)).get(name)
            if written is not None:
                return written.mtime_ns
    finally:
        delete(joined(uri, f"{CLAIMS}{name}"))
    raise OSError(f"{joined(uri, CLAIMS)}: a file that was just written isn't listed")


def _processes() -> str | None:
    """Return what names this machine's process ids: containers of one host name each count their own."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
