"""Augmentation policies: the named ones, and one's own, such as `medium flip=0 rotate=7`."""

import re
from collections.abc import Mapping
from typing import Any

from tuning.settings.words import nearest, show

# Largest value of each strength; the least is 0.
STRENGTHS = {
    "flip": 1.0,  # probability of mirroring left and right, the heart with them
    "rotate": 180.0,  # degrees, either way
    "shift": 0.5,  # fraction of the side, along each axis
    "scale": 0.9,  # relative size, larger or smaller
    "brightness": 1.0,  # relative
    "contrast": 1.0,  # relative
    "blur": 1.0,  # largest weight of the blurred copy
    "erase": 1.0,  # probability of a square of 0.1 to 0.5 of the side
    "crop": 0.95,  # largest part of the area that a random resized crop leaves out; sides within 3:4 and 4:3
    "trivial": 1.0,  # largest strength of TrivialAugment's one operation, relative to its own
    "mixup": 1.0,  # alpha of the beta distribution of another image's weight, with its label
    "cutmix": 1.0,  # alpha of that of the area that another image fills; with mixup too, half of the images each
}
# No radiograph is flipped upside down, nor by the weakest policy, which start points have, sideways: digits lose by it
# (benchmarks/README.md, "Horizontal flips").
POLICIES: dict[str, dict[str, float]] = {
    "none": {},
    "light": dict(flip=0.0, rotate=5, shift=0.04, scale=0.05, brightness=0.1, contrast=0.1),
    "medium": dict(flip=0.5, rotate=10, shift=0.08, scale=0.12, brightness=0.2, contrast=0.2, blur=0.5, erase=0.25),
    "strong": dict(flip=0.5, rotate=20, shift=0.12, scale=0.25, brightness=0.35, contrast=0.35, blur=1.0, erase=0.5),
}
NAME = re.compile(r"\w[\w.-]*")


def strengths(policy: str) -> dict[str, float]:
    """Return the strengths that a policy's text says, those of its base included."""
    found: dict[str, float] = {}
    for word in policy.rpartition(":")[2].split():
        key, equals, value = word.partition("=")
        found |= {key: float(value)} if equals else POLICIES[word]
    return found


def written(value: Any) -> str:
    """Return the text of a policy that is given as such, or as a mapping of strengths.

    A mapping may have a `name`, under which the policy is shown, and a `base`, whose strengths hold where it says
    nothing.

    Raises:
        ValueError: the rule that is broken.
    """
    if isinstance(value, Mapping):
        given = dict(value)
        name, base = given.pop("name", None), given.pop("base", None)
    elif isinstance(value, str):
        before, colon, rest = value.rpartition(":")
        words = rest.split()
        bases = [word for word in words if "=" not in word]
        if not words or len(bases) > 1 or (bases and words[0] != bases[0]):
            raise ValueError(f"must be {', '.join(POLICIES)}, or strengths such as `medium flip=0 rotate=7`")
        pairs = [word.split("=", 1) for word in words if "=" in word]
        name, base, given = (before.strip() if colon else None), (bases[0] if bases else None), dict(pairs)
        if len(given) < len(pairs):
            raise ValueError("must give each strength once")
    else:
        raise ValueError(f"must be {', '.join(POLICIES)}, or a mapping of strengths")
    if base is not None and base not in POLICIES:
        cure = nearest(base, POLICIES)
        raise ValueError(f"must be {', '.join(POLICIES)}, or strengths such as `medium flip=0`, got {show(base)}{cure}")
    if name is not None and (not isinstance(name, str) or not NAME.fullmatch(name) or name in POLICIES):
        raise ValueError(
            f"name: must be a word of letters, digits, '.', '_' and '-', and no policy's, got {show(name)}"
        )
    parts = [str(base)] if base is not None and (base != "none" or not given) else []
    parts += [f"{key}={_strength(key, given[key])}" for key in given]
    if not parts:
        raise ValueError(f"must give strengths ({', '.join(STRENGTHS)}) or a base")
    return " ".join(([f"{name}:"] if name is not None else []) + parts)


def _strength(key: Any, value: Any) -> str:
    if key not in STRENGTHS:
        raise ValueError(f"has no strength {show(key)}: use {', '.join(STRENGTHS)}{nearest(key, STRENGTHS)}")
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number <= STRENGTHS[key]:
        raise ValueError(f"{key}: must be a number from 0 to {STRENGTHS[key]:g}, got {show(value)}")
    return f"{number:g}"
