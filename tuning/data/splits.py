"""Which images belong together, and random splits by unit and class that are the same on every machine."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tuning.record.targets import NONE, each_label, is_multi_label
from tuning.settings.config import InputError
from tuning.settings.words import count, examples

SPLITS = ("test", "val", "train")  # in a tie the first keeps a unit, so that the test set never shrinks by one
TRIES = 20  # random splits that are tried until training and validation have every class


def random_splits(
    samples: pd.DataFrame, units: Sequence[str], *, val_fraction: float, test_fraction: float
) -> pd.DataFrame:
    """Return the samples with random splits where the data gives none, as `attrs["random_splits"]` names them.

    Args:
        samples: table of `load_samples`; the splits it names may be missing.
        units: for each sample, the name of the unit that has to stay in one split.
        val_fraction, test_fraction: as in `load_samples`.

    Raises:
        InputError: a class has too few units.
    """
    names = samples.attrs["random_splits"]
    train_fraction = 1 - val_fraction - (test_fraction if "test" in names else 0.0)
    fractions = {"train": train_fraction, "val": val_fraction, "test": test_fraction}
    pool = samples["split"].isna() | samples["split"].isin(names)
    return _split(samples, pool, units, {name: fractions[name] for name in names})


def resplit(samples: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return the samples with another random split into training and validation, in the same shares; test stays.

    Units of the audit stay whole: groups with all copies of their images, by the column `unit`. A split that leaves
    training or validation without a class is replaced by another; after `TRIES` the samples are returned unchanged.
    """
    pool = samples["split"] != "test"
    val_fraction = float((samples["split"] == "val").sum() / pool.sum())
    fractions = {"train": 1 - val_fraction, "val": val_fraction}
    units = [f"unit {unit}" for unit in samples["unit"]]
    for attempt in range(TRIES):
        with suppress(InputError):
            return _split(samples, pool, units, fractions, salt=f"{seed} {attempt} ")
    return samples


def _split(
    samples: pd.DataFrame, pool: pd.Series, units: Sequence[str], fractions: Mapping[str, float], salt: str = ""
) -> pd.DataFrame:
    """Put each unit of the pool into the split that most needs its classes, by the splits' fractions of the images.

    Units are taken in the order of the sha256 of `salt` and their names, so that neither the order of the rows nor the
    machine matters. For units of one image this is largest-remainder apportionment: each split's count of a class is
    within one image of its share. An InputError names classes without an image in train or val.

    Where images have several labels, units with the rarest label come first, and go to the split that most needs it
    (iterative stratification, Sechidis et al. 2011); one without an image in a split is no error at first, for labels
    that can't be learnt are left out.
    """
    chosen = [unit for unit, inside in zip(units, pool, strict=True) if inside]
    classes: dict[str, Counter[str]] = defaultdict(Counter)
    labels = each_label(samples.loc[pool, "label"])
    for unit, of_image in zip(chosen, labels, strict=True):
        classes[unit].update(of_image or [NONE])
    totals: Counter[str] = Counter()
    for counted in classes.values():
        totals.update(counted)
    several = is_multi_label(samples["label"])
    need = {(split, label): share * totals[label] for split, share in fractions.items() for label in totals}
    for split, label in need:
        if split != "test":  # a class of two images can still be trained and validated
            need[split, label] = max(need[split, label], 1.0)

    split_of: dict[str, str] = {}
    images: Counter[tuple[str, str]] = Counter()
    rarest = {unit: min(counts, key=lambda label: (totals[label], label)) for unit, counts in classes.items()}

    def order(unit: str) -> tuple[int, bytes]:
        return (totals[rarest[unit]] if several else 0, hashlib.sha256((salt + unit).encode()).digest())

    def lacking(split: str, unit: str) -> tuple[float, float]:
        first = need[split, rarest[unit]] if several else 0.0
        return first, sum(need[split, label] / totals[label] for label in sorted(classes[unit]))

    for unit in sorted(classes, key=order):
        counts = sorted(classes[unit].items())
        split = max(fractions, key=lambda name: lacking(name, unit))
        split_of[unit] = split
        for label, n_images in counts:
            need[split, label] -= n_images
            images[split, label] += n_images

    n_units = Counter(label for counts in classes.values() for label in counts)
    short = [
        f"{label!r} ({count(totals[label], 'image')} in {count(n_units[label], 'group')}) has none for {split}"
        for label in sorted(totals.keys() - ({NONE} if several else set()))
        for split in ("train", "val")
        if images[split, label] == 0 and not (several and not salt)
    ]
    if short:
        raise InputError(
            f"too few images for random splits: {examples(short)}; add images or groups of the class, leave it out, "
            "change val_fraction, or assign the splits yourself"
        )
    splits = samples["split"].copy()
    splits[pool] = [split_of[unit] for unit in chosen]
    return samples.assign(split=splits)


def number_units(groups: Sequence[str | None] | pd.Series, pairs: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    """Number the units: images of one group, copies of each other, and all that are linked through these.

    Args:
        groups: of each image; missing if it has none.
        pairs: indices of two images that are copies of each other.
    """
    first: dict[str, int] = {}
    same = [(index, first.setdefault(group, index)) for index, group in enumerate(groups) if not pd.isna(group)]
    edges = np.array([*same, *pairs], dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(groups), len(groups)))
    found: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return found


def in_one_split(splits: Sequence[str], unit: NDArray[np.int64]) -> list[str]:
    """Return the splits with each unit in the one that holds most of its images; see `SPLITS` for ties."""
    counts = np.zeros((int(unit.max(initial=-1)) + 1, len(SPLITS)), dtype=np.int64)
    np.add.at(counts, (unit, np.array([SPLITS.index(split) for split in splits], dtype=np.int64)), 1)
    return [SPLITS[index] for index in counts.argmax(axis=1)[unit]]
