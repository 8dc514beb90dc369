"""Learn an ordered list of configurations from the recorded curves: `tuning/settings/portfolio.yaml`.

Configurations are added greedily, each the one that most lowers the mean, over the sets, of the square root of the best
rank so far (0 the best of a table, 1 the worst). A rank is averaged with those of its neighbours: the next learning
rates, the other backbones and the other policies. A table that lacks a configuration counts it as the worst. Once no
configuration gains more, those after it are chosen as if there were none before.

Printed are, for each set, the true ranks there of a list that was learnt from sets of other sources: of the first
configuration, and the best of the first three. `--write` writes the list that is learnt from all.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import yaml

from benchmarks.record import FIXED, GRID
from benchmarks.recorded import Curves, curves_of
from tuning.settings.space_file import PORTFOLIO

SETS = ("generated", "xrays", "few", "rare", "digits", "patches")
SOURCES = {"few": "xrays", "rare": "generated"}  # sets that are parts of others, or drawn like them
NAMES = tuple(GRID)
RATES = GRID["learning_rate"]
RATE_WEIGHT, OTHER_WEIGHT = 0.5, 0.3  # of neighbours
LEAST_GAIN = 0.01  # in the mean root; what gains less does so by chance
Configuration = tuple[Any, ...]  # in the order of NAMES
Ranks = dict[Configuration, float]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Learn a portfolio from recorded curves."""

    size: int = 16
    """Configurations."""
    write: bool = False
    """Write the list that is learnt from all sets."""


def ranks(curves: Curves) -> Ranks:
    """The rank of each configuration by its best validation loss, from 0 to 1."""
    keys = list(curves.rows)
    order = np.argsort(np.argsort([curves.best(key) for key in keys], kind="stable"))
    found = {}
    for key, place in zip(keys, order, strict=True):
        values = {"batch_norm": "train"} | dict(zip(curves.grid, key, strict=True))
        found[tuple(values[name] for name in NAMES)] = float(place) / (len(keys) - 1)
    return found


def neighbours(configuration: Configuration) -> Iterator[tuple[Configuration, float]]:
    """Configurations that differ by one step of the learning rate, by the backbone or by the policy; their weights."""
    values = dict(zip(NAMES, configuration, strict=True))
    place = RATES.index(values["learning_rate"])
    for rate in RATES[max(place - 1, 0) : place + 2]:
        if rate != values["learning_rate"]:
            yield tuple((values | {"learning_rate": rate}).values()), RATE_WEIGHT
    for name, choices in (("backbone", GRID["backbone"]), ("augmentation", ("none", "light", "strong"))):
        for choice in choices:
            if choice != values[name]:
                yield tuple((values | {name: choice}).values()), OTHER_WEIGHT


def smoothed(found: Ranks) -> Ranks:
    """Ranks averaged with those of their neighbours."""
    means = {}
    for configuration, rank in found.items():
        pairs = [(rank, 1.0)] + [
            (found[other], weight) for other, weight in neighbours(configuration) if other in found
        ]
        means[configuration] = sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
    return means


def learn(tables: Sequence[Ranks], size: int) -> list[Configuration]:
    """The list of `size` configurations, in order, of which there are more."""
    means = [smoothed(table) for table in tables]
    candidates = sorted({configuration for table in means for configuration in table}, key=str)
    values = np.array([[table.get(configuration, 1.0) for table in means] for configuration in candidates])
    worst = np.ones(len(tables))
    best, chosen = worst, list[int]()
    while len(chosen) < size:
        scores = np.sqrt(np.minimum(values, best)).mean(axis=1)
        scores[chosen] = np.inf
        if best is not worst and np.sqrt(best).mean() - scores.min() < LEAST_GAIN:
            best = worst
            continue
        chosen.append(int(scores.argmin()))
        best = np.minimum(best, values[chosen[-1]])
    return [candidates[place] for place in chosen]


def without(name: str, size: int) -> list[Configuration]:
    """The list that is learnt from the sets of other sources than this one, of what its table has."""
    source = SOURCES.get(name, name)
    tables = [ranks(curves_of(other)) for other in SETS if SOURCES.get(other, other) != source]
    there = ranks(curves_of(name))
    return [configuration for configuration in learn(tables, 4 * size) if configuration in there][:size]


def as_point(configuration: Configuration) -> dict[str, Any]:
    """A configuration as a point of a search space."""
    point = dict(zip(NAMES, configuration, strict=True))
    point = {name: value for name, value in point.items() if name != "batch_norm" or point["unfreeze_depth"] > 0}
    return point | {"optimizer": FIXED["optimizer"]}  # for which its learning rate is


def main() -> None:
    """Print how lists do on sets that they weren't learnt from, and write the one of all."""
    flags = tyro.cli(Flags)
    for name in SETS:
        there = ranks(curves_of(name))
        found = [there[configuration] for configuration in without(name, flags.size)]
        print(f"{name}: first {found[0]:.3f}, best of three {min(found[:3]):.3f}, of {len(found)} {min(found):.3f}")
    points = [as_point(each) for each in learn([ranks(curves_of(name)) for name in SETS], flags.size)]
    if flags.write:
        head = [line for line in PORTFOLIO.read_text().splitlines() if line.startswith("#")]
        lines = [
            f"  - {yaml.safe_dump(point, default_flow_style=True, width=1000, sort_keys=False).strip()}"
            for point in points
        ]
        PORTFOLIO.write_text("\n".join([*head, "portfolio:", *lines, ""]))


if __name__ == "__main__":
    main()
