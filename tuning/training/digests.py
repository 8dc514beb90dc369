"""Which weights a run has, and the digests of their files, without torch, which the driver does not load."""

import hashlib
from collections.abc import Mapping
from typing import Any

from tuning.settings.values import Weights


def digests(weights: Mapping[str, Weights | None]) -> dict[str, str | None]:
    """Return the sha256, in hex, of each backbone's file of weights; None if its weights are random."""
    found: dict[str, str | None] = {}
    for backbone, given in weights.items():
        found[backbone] = None
        if given is not None:
            with open(given.file, "rb") as stream:
                found[backbone] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def other_weights(found: Mapping[str, str | None], recorded: Any) -> list[str]:
    """Return the backbones whose weights, by their `digests`, are not those recorded.

    Backbones that are not in `recorded` are not compared: runs of older versions have none.
    """
    known = recorded if isinstance(recorded, dict) else {}
    return [backbone for backbone, digest in found.items() if backbone in known and known[backbone] != digest]


def plain(weights: Mapping[str, Weights | None]) -> dict[str, Any]:
    """Return weights as JSON has them."""
    return {name: given and given.model_dump(mode="json") for name, given in weights.items()}


def weights_of(recorded: Mapping[str, Any]) -> dict[str, Weights | None]:
    """Return what `plain` was given."""
    return {name: None if given is None else Weights(**given) for name, given in recorded.items()}
