"""Which weights a run has: the digests of their files, without torch, which the driver does not load."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def digests(weights: Mapping[str, Path | None]) -> dict[str, str | None]:
    """Return the sha256, in hex, of each backbone's file of weights; None if its weights are random."""
    found: dict[str, str | None] = {}
    for backbone, file in weights.items():
        found[backbone] = None
        if file is not None:
            with open(file, "rb") as stream:
                found[backbone] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def other_weights(found: Mapping[str, str | None], recorded: Any) -> list[str]:
    """Return the backbones whose weights, by their `digests`, are not those recorded.

    Backbones that are not in `recorded` are not compared: runs of older versions have none.
    """
    known = recorded if isinstance(recorded, dict) else {}
    return [backbone for backbone, digest in found.items() if backbone in known and known[backbone] != digest]
