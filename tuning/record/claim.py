"""Who writes a run that lies in a storage, and the segments of its journal, which are named after their writers.

Each driver has a file in `drivers/`, which nobody else writes, so that no two can overwrite each other's. The one whose
name comes last is the driver: names begin with a number that counts them. A driver that was cut off for so long that
another has begun finds the other's name, and writes nothing more.
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

CLAIM_SECONDS = 60.0  # a driver that has not been heard of for so long is gone
CLAIMS = "drivers/"
NOW = "now-"  # begins the names of files there that are written to learn the storage's time
ASKED_TIMES = 3
SEGMENTS = "journal/"  # begin with the names of the claims for which they were written
_SEGMENT = re.compile(rf"{SEGMENTS}(?:\d+-\w+-(?P<begin>\d+)|\d+)\.jsonl")


def check_free(uri: str) -> None:
    """Refuse a run that another driver writes.

    How long it has not been heard of is the difference of two times of the storage, so no other clock matters.

    Raises:
        InputError: there is one, which is not known to be gone.
        OSError: the storage fails.
    """
    there = _claims(uri)
    if not there:
        return
    last = max(there)
    place = joined(uri, f"{CLAIMS}{last}.json")
    try:
        said = json.loads(read_bytes(place))
    except FileNotFoundError:  # that driver has just ended
        return
    here = (said["host"], said["processes"]) == (platform.node(), _processes()) and said["processes"] is not None
    if here and not Path(f"/proc/{said['pid']}").exists():
        return
    if _now(uri) - there[last].mtime_ns >= CLAIM_SECONDS * 1e9:
        return
    wait = f"wait {CLAIM_SECONDS:.0f} s" if there[last].mtime_ns else f"delete {place}"  # some storages tell no times
    raise InputError(
        f"{uri}: another search, on {said['host']}, is writing this run; stop it, or, if it has crashed, {wait}"
    )


def take(uri: str) -> str:
    """Become the driver of a run; returns the claim's name, which comes after those of all drivers before it.

    Raises:
        InputError: another driver writes the run.
        OSError: the storage fails.
    """
    check_free(uri)
    before = [*_claims(uri), *files_below(joined(uri, SEGMENTS))]
    number = max((int(found[0]) for other in before if (found := re.match(r"\d+(?=-)", other))), default=0) + 1
    name = f"{number:04d}-{uuid.uuid4().hex[:16]}"
    _write(uri, name)
    check_mine(uri, name)
    return name


def check_mine(uri: str, name: str) -> None:
    """Refuse to write a run that another driver has begun to write, or has written to its end.

    Raises:
        InputError: it is so.
        OSError: the storage fails.
    """
    there = list(_claims(uri))
    if name not in there:  # one that has written the run to its end has left no claim
        there += [segment[: len(name)] for segment in files_below(joined(uri, SEGMENTS)) if "-" in segment]
    if max(there, default=name) > name:
        raise InputError(
            f"{uri}: another search has taken this run over; this one ends, and what it hasn't sent is void"
        )


def renew(uri: str, name: str) -> None:
    """Say that the driver lives.

    Raises:
        InputError: another one has begun.
        OSError: the storage fails.
    """
    check_mine(uri, name)
    _write(uri, name)


def release(uri: str, name: str) -> None:
    """Take a claim away, and what drivers that were killed have left.

    Raises:
        OSError: the storage fails.
    """
    for left in files_below(joined(uri, CLAIMS)):
        if left.startswith(NOW) or (left.endswith(".json") and left.removesuffix(".json") <= name):
            delete(joined(uri, f"{CLAIMS}{left}"))


def _claims(uri: str) -> dict[str, Stored]:
    there = files_below(joined(uri, CLAIMS))
    return {name.removesuffix(".json"): known for name, known in there.items() if name.endswith(".json")}


def _write(uri: str, name: str) -> None:
    claim = {"host": platform.node(), "pid": os.getpid(), "processes": _processes()}
    write_bytes(joined(uri, f"{CLAIMS}{name}.json"), json.dumps(claim).encode())


def _now(uri: str) -> int:
    """The storage's time in ns: that of a file just written, which a driver that ends may delete at once."""
    name = f"{NOW}{uuid.uuid4().hex}"
    try:
        for _ in range(ASKED_TIMES):
            write_bytes(joined(uri, f"{CLAIMS}{name}"), b"now")
            written = files_below(joined(uri, CLAIMS)).get(name)
            if written is not None:
                return written.mtime_ns
    finally:
        delete(joined(uri, f"{CLAIMS}{name}"))
    raise OSError(f"{joined(uri, CLAIMS)}: what is written there isn't listed")


def _processes() -> str | None:
    """What tells whether a process id means the same here: containers of one name each count their own."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def segment(driver: str, begin: int) -> str:
    """Name in the run of the segment that a driver begins at this byte."""
    return f"{SEGMENTS}{driver}-{begin:012d}.jsonl"


def segments_among(names: Iterable[str]) -> list[str]:
    """Those of a run's files that are segments, in their order; counted ones come first."""
    found = [name for name in names if name.startswith(SEGMENTS) and name.endswith(".jsonl")]
    return sorted(found, key=lambda name: ("-" in name, name))


def read_segments(uri: str, names: list[str]) -> bytes:
    """The journal of these segments; what a driver sent after another had taken the run over is void.

    Raises:
        InputError: one is missing.
        OSError: the storage fails.
    """
    journal = bytearray()
    for name, lines in zip(names, read_all([joined(uri, name) for name in names]), strict=True):
        named = _SEGMENT.fullmatch(name)
        begin = int(named["begin"] or len(journal)) if named else math.inf
        if begin > len(journal):
            cure = "bring back the segments that lay before it"
            raise InputError(f"{joined(uri, name)}: doesn't go on with the journal; {cure}")
        del journal[int(begin) :]
        journal += lines
    return bytes(journal)
