"""Expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599)."""

import numpy as np
from numpy.typing import NDArray

from tuning.record.temperature import Floats, Ints

BINS = 15


def calibration_error(probabilities: Floats, targets: Ints) -> float:
    """Return the expected calibration error of probabilities [n, classes], in 15 bins of equal width.

    It is the difference of confidence and accuracy per bin, averaged over images. With few images it is biased upwards.
    For targets [n, labels] of 1, 0 and -1 (unknown) it is the mean over labels of that of a label's own probabilities.
    """
    if targets.ndim == 2:
        each = []
        for values, wanted in zip(probabilities.T, targets.T, strict=True):
            known = wanted >= 0
            if known.any():
                each.append(_error(values[known], wanted[known] == 1))
        return float(np.mean(each))
    return _error(probabilities.max(axis=1), probabilities.argmax(axis=1) == targets)


def _error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    surplus = np.bincount(bins, weights=right - confidence)
    return float(np.abs(surplus).sum() / len(confidence))
