"""Temperature scaling of probabilities (Guo et al. 2017, https://arxiv.org/abs/1706.04599), and their loss.

Targets [n] are class indices, of which each image has one: probabilities are a softmax of logits, whose loss is the
cross-entropy. Targets [n, labels] are 1, 0 or -1 (unknown) for each label: probabilities are sigmoids, the loss is the
mean binary cross-entropy of what is known, and each label has a temperature of its own.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, log_softmax, logit, softmax

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Temperature: TypeAlias = float | Floats  # of all classes, or of each label

TEMPERATURES = (0.05, 20.0)  # lowest and highest
GOLDEN = (np.sqrt(5) - 1) / 2
STEPS = 32  # of golden-section search, which leave a millionth of the range


def fit_temperature(logits: NDArray[Any], targets: Ints) -> Temperature:
    """Return the temperature within `TEMPERATURES` that minimises the loss of logits [n, classes]; one for each label.

    Logarithms of probabilities (of labels: of odds) do as well. Label smoothing by about one image in total (Platt
    1999) keeps the temperature off the ends of the range if all images are classified correctly.
    """
    values = logits.astype(np.float64)
    if targets.ndim == 2:
        return _label_temperatures(values, targets)
    from scipy.optimize import minimize_scalar  # takes a fifth of a second to load

    smoothing = 1 / (len(targets) + 2)
    wanted = np.eye(logits.shape[1])[targets] * (1 - smoothing) + smoothing / logits.shape[1]

    def loss(log_temperature: float) -> float:
        return float(-(wanted * log_softmax(values / np.exp(log_temperature), axis=1)).sum())

    found = minimize_scalar(loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded")
    return float(np.exp(found.x))


def _label_temperatures(values: Floats, targets: Ints) -> Floats:
    """Return the temperature of each label [labels], all searched for at once."""
    known = targets >= 0
    smoothing = 1 / (known.sum(axis=0) + 2)
    wanted = (targets == 1) * (1 - smoothing) + smoothing / 2

    def loss(log_temperatures: Floats) -> Floats:
        scaled = values / np.exp(log_temperatures)
        found: Floats = -(wanted * scaled + log_expit(-scaled)).sum(axis=0, where=known)
        return found

    low, high = (np.full(values.shape[1], bound) for bound in np.log(TEMPERATURES))
    for _ in range(STEPS):
        reach = GOLDEN * (high - low)
        left, right = high - reach, low + reach
        nearer = loss(left) < loss(right)
        low, high = np.where(nearer, low, left), np.where(nearer, right, high)
    temperatures: Floats = np.exp((low + high) / 2)
    return temperatures


def median_temperature(fitted: Sequence[Temperature]) -> Temperature:
    """Return the median temperature of several models, of labels that of each; 1 without models."""
    if not fitted:
        return 1.0
    median = np.median(np.array(fitted), axis=0)
    return float(median) if median.ndim == 0 else median


def plain(temperature: Temperature) -> float | list[float]:
    """Return a temperature as YAML and JSON write it: a number, or one for each label."""
    return [float(each) for each in temperature] if isinstance(temperature, np.ndarray) else float(temperature)


def tempered(logits: NDArray[Any], temperature: Temperature, *, multi_label: bool = False) -> Floats:
    """Return probabilities [n, classes] of logits, or of `logarithms` of probabilities, at a temperature."""
    values = logits.astype(np.float64) / temperature
    probabilities: Floats = expit(values) if multi_label else softmax(values, axis=1)
    return probabilities


def logarithms(probabilities: Floats, *, multi_label: bool = False) -> Floats:
    """Return natural logarithms of probabilities, of labels of their odds; all are finite."""
    tiny = np.finfo(np.float64).tiny
    if multi_label:
        odds: Floats = logit(np.clip(probabilities, tiny, 1 - np.finfo(np.float64).epsneg))
        return odds
    logs: Floats = np.log(np.maximum(probabilities, tiny))
    return logs


def image_losses(probabilities: Floats, targets: Ints) -> Floats:
    """Return what each image [n] has of the loss (nats) of probabilities [n, classes], which is their mean."""
    if targets.ndim == 1:
        return -logarithms(probabilities[np.arange(len(targets)), targets])
    known = targets >= 0
    each = np.zeros(targets.shape)
    each[known] = known_losses(probabilities, targets)
    losses: Floats = each.sum(axis=1) * len(targets) / max(int(known.sum()), 1)
    return losses


def known_losses(probabilities: Floats, targets: Ints) -> Floats:
    """Return the binary cross-entropy (nats) of each known target of [n, labels], row by row."""
    known = targets >= 0
    right = np.where(targets == 1, probabilities, 1 - probabilities)[known]
    return -logarithms(np.maximum(right, np.finfo(np.float64).epsneg / 2))


def tempered_loss(logits: NDArray[Any], targets: Ints) -> float:
    """Return the loss (nats) of logits [n, classes] at the temperature that fits these images best."""
    values = logits.astype(np.float64) / fit_temperature(logits, targets)
    if targets.ndim == 2:
        return float(-log_expit(np.where(targets == 1, values, -values))[targets >= 0].mean())
    return float(-log_softmax(values, axis=1)[np.arange(len(targets)), targets].mean())
