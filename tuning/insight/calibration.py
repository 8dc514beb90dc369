"""Expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599)."""

import numpy as np

from tuning.record.temperature import Floats, Ints

BINS = 15


def calibration_error(probabilities: Floats, targets: Ints) -> float:
    """Return the expected calibration error of probabilities [n, classes], in 15 bins of equal width.

    It is the difference of confidence and accuracy per bin, averaged over images. With few images it is biased upwards.
    """
    confidence = probabilities.max(axis=1)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    surplus = np.bincount(bins, weights=(probabilities.argmax(axis=1) == targets) - confidence)
    return float(np.abs(surplus).sum() / len(targets))
