"""What images are labelled with: one class each, or any number of labels that are there, absent or unknown.

In tables, an image's labels are one text: its class, or if it may have several labels `|Effusion|Mass?`: each after a
bar those that are there, and with a question mark those that are unknown. The others are absent; a bar alone is none.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuning.record.temperature import Floats, Ints, known_losses

SIGN, DOUBT = "|", "?"
ABSENT, PRESENT, UNKNOWN = 0, 1, -1
NONE = "no label"


def is_multi_label(labels: Sequence[str] | pd.Series) -> bool:
    """Return whether images may have several labels, as each of these texts then says."""
    return len(labels) > 0 and str(next(iter(labels))).startswith(SIGN)


def written(there: Mapping[str, bool | None]) -> str:
    """Return the text of an image's labels, given which are there, absent (False) or unknown (None)."""
    named = [name + (DOUBT if known is None else "") for name, known in sorted(there.items()) if known is not False]
    return SIGN + SIGN.join(named)


def named(label: str) -> dict[str, bool | None]:
    """Return the labels that a text says to be there (True) or unknown (None)."""
    parts = [part for part in label.split(SIGN) if part]
    return {part.removesuffix(DOUBT): None if part.endswith(DOUBT) else True for part in parts}


def shown(label: str) -> str:
    """Return the text of a class or of several labels as people read it."""
    if not label.startswith(SIGN):
        return label
    parts = [name if known else f"{name} (unknown)" for name, known in named(label).items()]
    return ", ".join(parts) or NONE


def each_label(labels: Iterable[str]) -> list[list[str]]:
    """Return the labels of each image that are there: one, if these are classes."""
    return [
        [name for name, known in named(label).items() if known] if label.startswith(SIGN) else [label]
        for label in labels
    ]


def one_row_per_label(samples: pd.DataFrame) -> pd.DataFrame:
    """Return the samples with a row for each label of each image."""
    if not is_multi_label(samples["label"]):
        return samples
    exploded = samples.assign(label=each_label(samples["label"])).explode("label")
    return exploded[exploded["label"].notna()].reset_index(drop=True)


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the classes, or the labels that an image may have, in alphabetical order."""
    return tuple(sorted({name for each in set(labels) for name in (named(each) if each.startswith(SIGN) else [each])}))


def encoded(labels: Sequence[str] | pd.Series, classes: Sequence[str]) -> Ints:
    """Return targets: the index of each image's class [n], or its labels [n, labels], which are 1, 0 or -1 (unknown).

    Args:
        labels: texts of the images.
        classes: names of all; labels that aren't among them are left out.
    """
    place = {name: index for index, name in enumerate(classes)}
    if not is_multi_label(labels):
        return np.array([place[label] for label in labels], dtype=np.int64)
    targets = np.zeros((len(labels), len(classes)), dtype=np.int64)
    for row, label in enumerate(labels):
        for name, known in named(label).items():
            if name in place:
                targets[row, place[name]] = PRESENT if known else UNKNOWN
    return targets


def by_class(targets: Ints, classes: int) -> NDArray[Any]:
    """Return, for each image and class or label [n, classes], whether it is there: 1, 0 or -1 (unknown)."""
    return targets if targets.ndim == 2 else (targets[:, None] == np.arange(classes)).astype(np.int8)


def counted(samples: pd.DataFrame) -> pd.DataFrame:
    """Return the numbers of images of each class or label [labels, splits]; of labels, also those with none."""
    rows = one_row_per_label(samples)
    counts = rows.groupby(["label", "split"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=sorted(samples["split"].unique()), fill_value=0)
    if is_multi_label(samples["label"]):
        without = samples[[not each for each in each_label(samples["label"])]]
        if len(without):
            counts.loc[NONE] = without["split"].value_counts()
    return counts.fillna(0).astype(int)


def unknown_labels(samples: pd.DataFrame) -> dict[str, int]:
    """Return in how many images each label is unknown; empty if all are known."""
    labels = samples["label"].to_list()
    counts = Counter(
        name for label in labels if label.startswith(SIGN) for name, known in named(label).items() if known is None
    )
    return dict(sorted(counts.items()))


def frequencies(targets: Ints, classes: int) -> Floats:
    """Return the share of each class, or of each label among the images of which it is known."""
    if targets.ndim == 1:
        return np.bincount(targets, minlength=classes) / len(targets)
    shares: Floats = (targets == PRESENT).sum(axis=0) / np.maximum((targets != UNKNOWN).sum(axis=0), 1)
    return shares


def constant_loss(targets: Ints, classes: int) -> float:
    """Return the loss (nats) of always predicting the class frequencies: the entropy; of labels, its mean."""
    shares = frequencies(targets, classes)
    if targets.ndim == 1:
        return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
    return float(known_losses(np.broadcast_to(shares, targets.shape), targets).mean())


def most_frequent(labels: Iterable[str]) -> list[tuple[str, int]]:
    """Return the classes or labels with their numbers of images, the most frequent first."""
    return Counter(name for each in each_label(labels) for name in each).most_common()
