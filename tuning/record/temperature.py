"""Temperature scaling of probabilities (Guo et al. 2017, https://arxiv.org/abs/1706.04599)."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

TEMPERATURES = (0.05, 20.0)  # lowest and highest


def fit_temperature(logits: NDArray[Any], targets: Ints) -> float:
    """Return the temperature within `TEMPERATURES` that minimises the cross-entropy of logits [n, classes].

    Logarithms of probabilities do as well. Label smoothing by about one image in total (Platt 1999) keeps the
    temperature off the ends of the range if all images are classified correctly.
    """
    from scipy.optimize import minimize_scalar  # takes a fifth of a second to load

    values, smoothing = logits.astype(np.float64), 1 / (len(targets) + 2)
    wanted = np.eye(logits.shape[1])[targets] * (1 - smoothing) + smoothing / logits.shape[1]

    def loss(log_temperature: float) -> float:
        return float(-(wanted * log_softmax(values / np.exp(log_temperature), axis=1)).sum())

    found = minimize_scalar(loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded")
    return float(np.exp(found.x))


def tempered(logits: NDArray[Any], temperature: float) -> Floats:
    """Return probabilities [n, classes] of logits, or of logarithms of probabilities, at a temperature."""
    probabilities: Floats = softmax(logits.astype(np.float64) / temperature, axis=1)
    return probabilities


def logarithms(probabilities: Floats) -> Floats:
    """Return natural logarithms, with 0 replaced by the smallest normal float."""
    logs: Floats = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    return logs


def tempered_loss(logits: NDArray[Any], targets: Ints) -> float:
    """Return the cross-entropy (nats) of logits [n, classes] at the temperature that fits these images best."""
    values = logits.astype(np.float64) / fit_temperature(logits, targets)
    return float(-log_softmax(values, axis=1)[np.arange(len(targets)), targets].mean())
