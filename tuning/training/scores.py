"""Predictions, and what is measured of them."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit, log_softmax
from torch import Tensor, nn
from torch.nn import functional

from tuning.record.measures import RANKED, mean_f1, ranked
from tuning.record.targets import by_class
from tuning.record.temperature import tempered_loss
from tuning.training.dataset import Indices, Prepare
from tuning.training.device import in_float32

SCORES = ("accuracy", "balanced_accuracy", "f1", *RANKED)  # from 0 to 1, more being better


def evaluation_batch(device: torch.device) -> int:
    """Return the number of images that are evaluated at once."""
    return 64 if device.type == "cpu" else 128


@torch.no_grad()
def predict(forward: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> NDArray[np.float32]:
    """Return logits [n, classes]; `forward` is a model in eval mode, or its trained part."""
    with in_float32():
        return torch.cat([forward(batch) for batch in batches]).cpu().numpy()


def predict_images(network: nn.Module, prepare: Prepare, indices: Indices) -> NDArray[np.float32]:
    """Return logits [n, classes] of a whole network for unaugmented images; the network is put in eval mode."""
    network.eval()
    size = evaluation_batch(next((tensor.device for tensor in network.parameters()), torch.device("cpu")))
    batches = (prepare(indices[first : first + size], None, "none") for first in range(0, len(indices), size))
    return predict(network, batches)


def class_weights(targets: NDArray[np.int64], classes: int) -> Tensor:
    """Return weights inverse to the frequencies of classes [classes], or of each label's 0 and 1 [2, classes]."""
    if targets.ndim == 1:
        inverse = len(targets) / np.maximum(np.bincount(targets, minlength=classes), 1) / classes
    else:
        sides = np.stack([(targets == value).sum(axis=0) for value in (0, 1)])
        inverse = sides.sum(axis=0) / np.maximum(sides, 1) / 2
    return torch.tensor(inverse, dtype=torch.float32)


def target_weight(targets: Tensor, weights: Tensor | None, shares: Tensor | None = None) -> Tensor | int:
    """Return the sum of the weights of targets; unknown ones have none.

    Args:
        targets: class indices [n], or labels [n, classes] of 1, 0 and -1 (unknown).
        weights: of `class_weights`; None: 1.
        shares: of the images [n], by which their weights are multiplied; None: 1.
    """
    if targets.ndim == 2:
        return _cell_weights(targets, weights, shares).sum().clamp_min(1e-6)
    if shares is not None:
        return (shares if weights is None else weights[targets] * shares).sum()
    return len(targets) if weights is None else weights[targets].sum()


def loss_sum(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
    shares: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of the losses (nats) of logits [n, classes]; `target_weight` makes it a mean.

    It is the cross-entropy of classes, or the binary cross-entropy of known labels; other arguments as there.
    """
    if targets.ndim == 1:
        how = {"weight": weights, "label_smoothing": smoothing}
        if shares is not None:
            return (functional.cross_entropy(logits, targets, reduction="none", **how) * shares).sum()  # type: ignore[arg-type]
        return functional.cross_entropy(logits, targets, reduction="sum", **how)  # type: ignore[arg-type]
    wanted = (targets == 1).to(logits.dtype) * (1 - smoothing) + smoothing / 2
    cells = _cell_weights(targets, weights, shares)
    return functional.binary_cross_entropy_with_logits(logits, wanted, weight=cells, reduction="sum")


def _cell_weights(targets: Tensor, weights: Tensor | None, shares: Tensor | None) -> Tensor:
    known = (targets >= 0).float()
    if shares is not None:
        known = known * shares[:, None]
    return known if weights is None else known * torch.where(targets == 1, weights[1], weights[0])


def mean_loss(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float | None:
    """Return the loss (nats) of logits [n, classes], given targets as in `target_weight`; None if it is not finite."""
    wanted = torch.from_numpy(targets)
    loss = float(loss_sum(torch.from_numpy(logits), wanted) / target_weight(wanted, None))
    return loss if math.isfinite(loss) else None


def score(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> dict[str, float | None]:
    """Return the loss (nats), plain and tempered, and `SCORES` of logits [n, classes].

    All are None if the loss is not finite, and those that compare ranks unless all classes are there. Of labels they
    are means over the labels, each predicted from a probability of 0.5.
    """
    loss = mean_loss(logits, targets)
    if loss is None:
        return dict.fromkeys(("loss", "tempered_loss", *SCORES))
    cells = by_class(targets, logits.shape[1])
    if targets.ndim == 2:
        values, calls, found = logits.astype(np.float64), logits > 0, _label_scores(logits > 0, targets)
    else:
        values, predicted = torch.softmax(torch.from_numpy(logits).double(), dim=1).numpy(), logits.argmax(axis=1)
        calls = predicted[:, None] == np.arange(logits.shape[1])
        shares = [(predicted[targets == index] == index).mean() for index in np.unique(targets)]
        found = {"accuracy": float((predicted == targets).mean()), "balanced_accuracy": float(np.mean(shares))}
    found |= {"f1": mean_f1(calls, cells), **ranked(values, cells)}
    return {"loss": loss, "tempered_loss": tempered_loss(logits, targets), **found}


def _label_scores(called: NDArray[np.bool_], targets: NDArray[np.int64]) -> dict[str, float | None]:
    shares = []
    for calls, wanted in zip(called.T, targets.T, strict=True):
        sides = [calls[wanted == side] == side for side in (0, 1)]
        if all(map(len, sides)):
            shares += [float(side.mean()) for side in sides]
    return {
        "accuracy": float((called == targets)[targets >= 0].mean()),
        "balanced_accuracy": float(np.mean(shares)) if shares else None,
    }


def calibrated_loss(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float | None:
    """Return the loss (nats) after the best calibration: one scale for all logits, one shift for each class or label.

    Early in fine-tuning, batch norm's lagging statistics put logits [n, classes] out of scale: this loss shows sooner
    than plain cross-entropy how well they separate the classes. None if a logit is not finite.
    """
    if not np.isfinite(logits).all():
        return None
    centred = logits.astype(np.float64) - logits.mean(axis=0)  # far from it the search for the best shifts ends early
    inputs = centred / (float(np.abs(centred - centred.mean(axis=1, keepdims=True)).max()) or 1.0)
    n, classes = logits.shape
    bounds = [(0.0, None)] + [(None, None)] * classes
    start = np.concatenate([[1.0], np.zeros(classes)])
    if targets.ndim == 2:
        return float(minimize(_label_loss(inputs, targets), start, jac=True, bounds=bounds).fun)
    smoothing = 1 / (n + 2)  # of one image's worth: perfectly separated classes have no best scale otherwise
    wanted = np.full((n, classes), smoothing / classes)
    wanted[np.arange(n), targets] += 1 - smoothing

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logs = log_softmax(inputs * parameters[0] + parameters[1:], axis=1)
        slopes = (np.exp(logs) - wanted) / n
        return -float((wanted * logs).sum()) / n, np.concatenate([[(slopes * inputs).sum()], slopes.sum(axis=0)])

    return float(minimize(loss, start, jac=True, bounds=bounds).fun)


def _label_loss(inputs: NDArray[np.float64], targets: NDArray[np.int64]) -> Callable[..., Any]:
    """Return the binary cross-entropy of known labels and its gradient, as a function of one scale and shifts."""
    known = targets >= 0
    smoothing = 1 / (len(targets) + 2)
    wanted = (targets == 1) * (1 - smoothing) + smoothing / 2
    cells = max(int(known.sum()), 1)

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scaled = inputs * parameters[0] + parameters[1:]
        slopes = (expit(scaled) - wanted) * known / cells
        value = -float((wanted * scaled + log_expit(-scaled)).sum(where=known)) / cells
        return value, np.concatenate([[(slopes * inputs).sum()], slopes.sum(axis=0)])

    return loss
