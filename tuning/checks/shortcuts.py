"""What predicts the class without the picture: size, colour mode, file format, the border, a tiny thumbnail.

A network learns whatever is easiest, such as the hospital instead of the disease (DeGrave et al. 2021, AI for
radiographic COVID-19 detection selects shortcuts over signal).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from tuning.checks.alignment import Floats, Ints

Reals: TypeAlias = NDArray[np.float64]

VERSION = 2  # raised with any change of what is found
FOLDS = 5
SHUFFLES = 199  # of the labels: the smallest p-value is 1/200
P_VALUE = 0.01  # the largest that is reported
PARTS = 16  # that a number is divided into
MOST_IMAGES = 6000  # random ones that rules are tried on; they estimate an accuracy to within about one percent
MOST_TARGETS = 4000  # classes times shuffles at once
ALPHA = 0.1  # penalty of a linear probe per image, for features of unit variance; 0.03 and 0.3 predicted as well
SIDE = 32  # of the pictures that the probes see, in pixels
BORDER = 5  # pixels of them

# The skill from which a rule is reported. No disease affects size, colour mode or file format.
STRANGE = 0.2
# It may affect the rest: on chest films of one source, normal against pneumonia, the skill of brightness was 0.39, of
# the file size 0.46, of the border 0.49. A mark of 5% of the side in a corner gave the border 0.97 and more, one
# anywhere within another 10% gave 0.74 and more.
TELLING = 0.6
# A thumbnail's was 0.53 there, 0.37 on the generated radiographs. From here on the task is suspiciously easy.
EASY = 0.8
SHAPE = "longer / shorter side"


class Shortcut(NamedTuple):
    """The best of a family of rules."""

    finding: str
    accuracy: float  # cross-validated
    baseline: float  # accuracy of always predicting the most frequent class
    p_value: float
    rule: str  # in words, such as `width over 250 predicts covid`

    @property
    def skill(self) -> float:
        """Share of the baseline's errors that the rule avoids."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)

    @property
    def honest(self) -> bool:
        """Whether the disease itself may well be the reason."""
        return self.finding == "shortcut_thumbnail" and self.skill < EASY


class Folds(NamedTuple):
    """Labels to predict, and the cross-validation: the same for all rules, so that they can be compared."""

    classes: tuple[str, ...]
    labels: Ints  # [1 + shuffles, n]: the true ones, then shuffled ones
    fold: Ints  # [n]


def folds(labels: Sequence[str], units: Ints) -> Folds | None:
    """Return folds that keep each unit whole, stratified by class, and labels shuffled by whole units.

    None if nothing can be tried: there are fewer than two classes, or a class has fewer than two units.

    Args:
        labels: class of each image.
        units: number of each image's unit, such as the patient.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # takes a second to load

    classes = tuple(sorted(set(labels)))
    true = np.array([classes.index(label) for label in labels], dtype=np.int64)
    fewest = min((len(np.unique(units[true == index])) for index in range(len(classes))), default=0)
    if fewest < 2 or len(classes) < 2:
        return None
    alone = len(np.unique(units)) == len(units)  # the grouped one is slow
    splitter = (StratifiedKFold if alone else StratifiedGroupKFold)(min(FOLDS, fewest), shuffle=True, random_state=0)
    fold = np.empty(len(true), dtype=np.int64)
    for number, (_, inside) in enumerate(splitter.split(true, true, None if alone else units)):
        fold[inside] = number
    there, fold = np.unique(fold, return_inverse=True)  # units of many images may leave a fold empty
    return Folds(classes, _shuffled(true, units), fold) if len(there) > 1 else None


def _shuffled(true: Ints, units: Ints) -> Ints:
    """The labels laid out unit after unit, with the units in another order each time."""
    order = np.argsort(units, kind="stable")
    blocks = np.split(true[order], np.flatnonzero(np.diff(units[order])) + 1)
    rng = np.random.default_rng(0)
    labels = np.empty((1 + SHUFFLES, len(true)), dtype=np.int64)
    labels[0] = true
    for row in labels[1:]:
        row[order] = np.concatenate([blocks[index] for index in rng.permutation(len(blocks))])
    return labels


def best_table(finding: str, facts: Mapping[str, Sequence[str] | Reals], folds: Folds) -> Shortcut:
    """Return the fact that alone best predicts some class against the rest.

    Numbers are divided into at most `PARTS` parts of equal size; a part predicts the class if most of its training
    images are of it. The p-value is that of the best of all facts and classes.

    Args:
        facts: by name, words or numbers of each image.
    """
    n_classes = len(folds.classes)
    found: list[tuple[float, Shortcut]] = []
    best_shuffled = np.full(SHUFFLES, -np.inf)
    for name, values in facts.items():
        parts, part = _parts(values)
        counts = _counts(part, len(parts), folds)  # [1 + shuffles, folds, parts, classes]
        trained = counts.sum(axis=1, keepdims=True) - counts
        called = 2 * trained > trained.sum(axis=-1, keepdims=True)
        right = np.where(called, counts, counts.sum(axis=-1, keepdims=True) - counts).sum(axis=(1, 2))
        accuracy = right / len(part)
        baseline, skill = _skills(accuracy, counts[0].sum(axis=(0, 1)) / len(part))
        best_shuffled = np.maximum(best_shuffled, skill[1:].max(axis=1))
        target = int(skill[0].argmax()) if n_classes > 2 else int(counts[0].sum(axis=(0, 1)).argmin())
        whole = counts[0, :, :, target].sum(axis=0) * 2 > counts[0].sum(axis=(0, 2))
        rule = f"{_words(name, parts, whole)} predicts {folds.classes[target]}"
        found.append((skill[0, target], Shortcut(finding, accuracy[0, target], baseline[target], 1.0, rule)))
    skill_found, best = max(found, key=lambda pair: pair[0])
    return best._replace(p_value=_p_value(skill_found, best_shuffled))


def _parts(values: Sequence[str] | Reals) -> tuple[list[str] | Reals, Ints]:
    """The different words, or the upper ends of a number's parts; and the part of each image."""
    if not isinstance(values, np.ndarray):
        words, part = np.unique(np.array(values, dtype=str), return_inverse=True)
        return words.tolist(), part
    ends = np.unique(values)
    if len(ends) > PARTS:
        ends = np.unique(np.quantile(values, np.linspace(0, 1, PARTS + 1)[1:], method="inverted_cdf"))
    return ends, np.searchsorted(ends, values).astype(np.int64)


def _counts(part: Ints, n_parts: int, folds: Folds) -> Ints:
    """Images by labelling, fold, part and class."""
    shape = (len(folds.labels), int(folds.fold.max()) + 1, n_parts, len(folds.classes))
    labelling = np.arange(shape[0])[:, None]
    flat = np.ravel_multi_index((labelling, folds.fold[None], part[None], folds.labels), shape)
    return np.bincount(flat.ravel(), minlength=int(np.prod(shape))).reshape(shape)


def _words(name: str, parts: list[str] | Reals, called: NDArray[np.bool_]) -> str:
    if isinstance(parts, list):
        return f"{name} " + " or ".join(word for word, yes in zip(parts, called, strict=True) if yes)
    if name == SHAPE and list(called) == [index > 0 for index in range(len(parts))]:
        return "a non-square shape"
    runs = np.flatnonzero(np.diff(np.r_[False, called, False])).reshape(-1, 2)  # begins, ends beyond
    ranges = []
    for begin, end in runs:
        low = f"over {_number(parts[begin - 1])}" if begin else ""
        high = f"up to {_number(parts[end - 1])}" if end < len(parts) else ""
        ranges.append(f"{low} {high}".strip())
    return f"{name} " + " or ".join(ranges)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def linear_probe(finding: str, name: str, features: Floats, folds: Folds) -> Shortcut:
    """Return how well a ridge regression on pixels predicts the classes, all at once or one against the rest.

    Args:
        name: the features in words.
        features: [n, features].
    """
    from sklearn.linear_model import Ridge

    n_classes = len(folds.classes)
    features = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-3 * features.std() + 1e-6)
    right = np.zeros((len(folds.labels), n_classes + 1))
    step = max(1, MOST_TARGETS // n_classes)
    for number in range(int(folds.fold.max()) + 1):
        inside = folds.fold == number
        for first in range(0, len(folds.labels), step):
            labels = folds.labels[first : first + step]
            targets = np.eye(n_classes, dtype=np.float32)[labels]  # [labellings, n, classes]
            flat = targets[:, ~inside].transpose(1, 0, 2).reshape(int((~inside).sum()), -1)
            with threadpool_limits(1, user_api="blas"):  # several threads were many times slower on a busy machine
                ridge = Ridge(ALPHA * len(flat), solver="cholesky").fit(features[~inside], flat)
                scores = ridge.predict(features[inside]).reshape(-1, len(labels), n_classes).transpose(1, 0, 2)
            one = targets[:, inside] > 0.5
            right[first : first + step, :n_classes] += ((scores > 0.5) == one).sum(axis=1)
            right[first : first + step, n_classes] += (scores.argmax(axis=2) == labels[:, inside]).sum(axis=1)
    accuracy = right / len(features)
    baseline, skill = _skills(accuracy, np.bincount(folds.labels[0]) / len(features))
    target = int(skill[0].argmax())
    predicted = "the class" if n_classes == 2 or target == n_classes else folds.classes[target]
    p_value = _p_value(skill[0, target], skill[1:].max(axis=1))
    return Shortcut(finding, accuracy[0, target], baseline[target], p_value, f"{name} predicts {predicted}")


def _skills(accuracy: Reals, shares: Reals) -> tuple[Reals, Reals]:
    """The majority-class baseline, and the share of its errors that are avoided.

    Args:
        accuracy: [labellings, targets]: each class against the rest, then, if tried, all classes at once.
        shares: of each class.
    """
    baseline = np.r_[np.maximum(shares, 1 - shares), shares.max()][: accuracy.shape[1]]
    return baseline, (accuracy - baseline) / (1 - baseline)


def _p_value(skill: float, shuffled: Reals) -> float:
    return float((1 + (shuffled >= skill).sum()) / (1 + len(shuffled)))


def sampled(labels: Sequence[str], units: Ints) -> Ints:
    """Return the indices of the images that rules are tried on, without classes that have one unit only."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(labels))[:MOST_IMAGES])
    names = np.array(labels, dtype=object)[chosen]
    units_of = pd.Series(units[chosen]).groupby(names).nunique()
    return chosen[[units_of[name] > 1 for name in names]]


def shortcuts(pictures: Floats, facts: pd.DataFrame, labels: Sequence[str], units: Ints) -> list[Shortcut] | None:
    """Return the rules that are clearly better than the baseline; None if none can be tried, as in `folds`.

    Args:
        pictures: [n, SIDE, SIDE, channels], levels from 0 to 255.
        facts: `width`, `height`, `mode`, `format` and `bytes` of each file.
        labels, units: as in `folds`.
    """
    tried = folds(labels, units)
    if tried is None:
        return None
    width, height, size = (facts[name].to_numpy(np.float64) for name in ("width", "height", "bytes"))
    grey = pictures.mean(axis=3)
    colour = (pictures.max(axis=3) - pictures.min(axis=3)).mean(axis=(1, 2)).astype(np.float64)
    shape = {SHAPE: np.maximum(width, height) / np.minimum(width, height), "width": width, "height": height}
    light = {"brightness": grey.mean(axis=(1, 2)).astype(np.float64), "contrast": grey.std(axis=(1, 2)).astype(float)}
    no_colour = facts["mode"].str.startswith(("I;16", "1"))  # of more or fewer bits than L, which is no colour
    colours = {"colour mode": facts["mode"].mask(no_colour, "L").tolist(), "colourfulness": colour}
    bits = facts["mode"].map(lambda mode: {"I": "16", "1": "1"}.get(mode[0], "8"))
    stored = {"file format": facts["format"].tolist(), "bits per value": bits.tolist()}
    sizes = {"file size in bytes": size, "bytes per pixel": size / (width * height)}
    found = [
        (best_table("shortcut_shape", shape | {"width / height": width / height}, tried), STRANGE),
        (best_table("shortcut_colour", colours, tried), STRANGE),
        (best_table("shortcut_colour", light, tried), TELLING),
        (best_table("shortcut_metadata", stored, tried), STRANGE),
        (best_table("shortcut_metadata", sizes, tried), TELLING),
    ]
    edge = np.ones((SIDE, SIDE), dtype=bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    halves = pictures.reshape(len(pictures), SIDE // 2, 2, SIDE // 2, 2, -1).mean(axis=(2, 4))
    thumbnails = halves.reshape(len(pictures), -1)
    found += [
        (linear_probe("shortcut_border", "the border alone", grey[:, edge], tried), TELLING),
        (linear_probe("shortcut_thumbnail", f"a thumbnail of {SIDE // 2} px", thumbnails, tried), STRANGE),
    ]
    return [rule for rule, least in found if rule.p_value <= P_VALUE and rule.skill >= least]
