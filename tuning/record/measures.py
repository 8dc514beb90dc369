"""How well values tell one class from the rest: AUROC, AUPRC, sensitivity at a specificity, F1."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Values = NDArray[Any]

SPECIFICITIES = (0.9, 0.95)  # at which sensitivity is given


def auroc(positive: Bools, values: Values) -> float:
    """Return the probability that a positive has a higher value than a negative, ties counting half (Mann-Whitney).

    scikit-learn's takes half a second to load and milliseconds a call, more than an epoch of a head-only trial.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    n_positive = int(positive.sum())
    above = float(ranks[inverse][positive].sum()) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * (len(positive) - n_positive))


def average_precision(positive: Bools, values: Values) -> float:
    """Return the area under the precision-recall curve, as scikit-learn's `average_precision_score`: by steps."""
    gained, reached, up_to = precision_steps(positive, values)[1:]
    return float((gained * reached / up_to).sum() / positive.sum())


def precision_steps(positive: Bools, values: Values) -> tuple[Values, Values, Values, Values]:
    """Return the step of each value [n], from the highest; and by step the positives in it, those up to it, and all."""
    order = np.argsort(-values, kind="stable")
    last = np.append(np.diff(values[order]) != 0, True)  # of equal values
    ends = np.flatnonzero(last)
    reached = np.cumsum(positive[order])[ends]
    step = np.empty(len(values), dtype=np.int64)
    step[order] = np.cumsum(last) - last
    return step, np.diff(reached, prepend=0), reached, ends + 1


def threshold(negatives: Values, specificity: float) -> float:
    """Return the lowest of the values of negatives above which is at most a share 1 - `specificity` of them."""
    return float(np.sort(negatives)[max(int(np.ceil(specificity * len(negatives))) - 1, 0)])


def sensitivity_at(positive: Bools, values: Values, specificity: float) -> float:
    """Return the share of positives above the `threshold` of a specificity."""
    return float((values[positive] > threshold(values[~positive], specificity)).mean())


def f1(positive: Bools, called: Bools) -> float:
    """Return the harmonic mean of precision and sensitivity."""
    return 2 * float((positive & called).sum()) / float(positive.sum() + called.sum())


RANKED: dict[str, Callable[[Bools, Values], float]] = {
    "auroc": auroc,
    "auprc": average_precision,
    **{f"sensitivity_at_{each * 100:g}": partial(sensitivity_at, specificity=each) for each in SPECIFICITIES},
}


def ranked(values: Values, cells: Values) -> dict[str, float | None]:
    """Return the means over classes of `RANKED`; None unless each class is there, and a rest.

    Args:
        values: [n, classes], more where a class is likelier.
        cells: [n, classes] of 1, 0 and -1 (unknown).
    """
    if not ((cells == 1).any(axis=0) & (cells == 0).any(axis=0)).all():
        return dict.fromkeys(RANKED)
    known = cells >= 0
    each = [(cells[known[:, place], place] == 1, values[known[:, place], place]) for place in range(cells.shape[1])]
    return {name: float(np.mean([of(*one) for one in each])) for name, of in RANKED.items()}


def mean_f1(calls: Bools, cells: Values) -> float | None:
    """Return the mean F1 over the classes that are there of calls [n, classes]; None if none is; `cells` as above."""
    known, there = cells >= 0, np.flatnonzero((cells == 1).any(axis=0))
    each = [f1(cells[known[:, place], place] == 1, calls[known[:, place], place]) for place in there]
    return float(np.mean(each)) if each else None
