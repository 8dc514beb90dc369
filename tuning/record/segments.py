"""A run's journal in a storage: in segments, for objects can't be appended to.

A segment's name says which driver wrote it, by the name of its claim, and at which byte of the journal it begins. A
version before, which had no such claims, counted them: each goes on where the one before it ends.
"""

import math
import re
from collections.abc import Iterable

from tuning.record.claim import SEGMENTS
from tuning.record.storage import joined, read_all
from tuning.settings.config import InputError

_NAME = re.compile(rf"{SEGMENTS}(?:\d+-\w+-(?P<begin>\d+)|\d+)\.jsonl")


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
        named = _NAME.fullmatch(name)
        begin = int(named["begin"] or len(journal)) if named else math.inf
        if begin > len(journal):
            cure = "bring back the segments that lay before it"
            raise InputError(f"{joined(uri, name)}: doesn't go on with the journal; {cure}")
        del journal[int(begin) :]
        journal += lines
    return bytes(journal)
