"""Predictions, and what is measured of them."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor, nn
from torch.nn import functional

from tuning.record.temperature import tempered_loss
from tuning.training.dataset import Indices, Prepare
from tuning.training.device import in_float32


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


def mean_loss(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float | None:
    """Return the cross-entropy (nats) of logits [n, classes], given classes [n]; None if it is not finite."""
    loss = float(functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets)))
    return loss if math.isfinite(loss) else None


def score(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> dict[str, float | None]:
    """Return cross-entropy (nats), plain and tempered, accuracy, balanced accuracy and AUROC of logits [n, classes].

    All are None if the loss is not finite; AUROC is None unless all classes are there.
    """
    loss = mean_loss(logits, targets)
    if loss is None:
        return dict.fromkeys(("loss", "tempered_loss", "accuracy", "balanced_accuracy", "auroc"))
    predicted = logits.argmax(axis=1)
    probabilities = torch.softmax(torch.from_numpy(logits).double(), dim=1).numpy()
    classes = np.unique(targets)
    return {
        "loss": loss,
        "tempered_loss": tempered_loss(logits, targets),
        "accuracy": float((predicted == targets).mean()),
        "balanced_accuracy": float(np.mean([(predicted[targets == index] == index).mean() for index in classes])),
        "auroc": float(np.mean([auroc(targets == index, probabilities[:, index]) for index in classes]))
        if 1 < len(classes) == logits.shape[1]
        else None,
    }


def auroc(positive: NDArray[np.bool_], values: NDArray[np.float64]) -> float:
    """Return the probability that a positive has a higher value than a negative, ties counting half (Mann-Whitney).

    scikit-learn's takes half a second to load and milliseconds a call, more than an epoch of a head-only trial.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    n_positive = int(positive.sum())
    above = float(ranks[inverse][positive].sum()) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * (len(positive) - n_positive))


def calibrated_loss(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float | None:
    """Return the cross-entropy (nats) after the best calibration: one scale for all logits, one shift for each class.

    Early in fine-tuning, batch norm's lagging statistics put logits [n, classes] out of scale: this loss shows sooner
    than plain cross-entropy how well they separate the classes. None if a logit is not finite.
    """
    if not np.isfinite(logits).all():
        return None
    centred = logits.astype(np.float64) - logits.mean(axis=0)  # far from it the search for the best shifts ends early
    inputs = centred / (float(np.abs(centred - centred.mean(axis=1, keepdims=True)).max()) or 1.0)
    n, classes = logits.shape
    smoothing = 1 / (n + 2)  # of one image's worth: perfectly separated classes have no best scale otherwise
    wanted = np.full((n, classes), smoothing / classes)
    wanted[np.arange(n), targets] += 1 - smoothing

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logs = log_softmax(inputs * parameters[0] + parameters[1:], axis=1)
        slopes = (np.exp(logs) - wanted) / n
        return -float((wanted * logs).sum()) / n, np.concatenate([[(slopes * inputs).sum()], slopes.sum(axis=0)])

    bounds = [(0.0, None)] + [(None, None)] * classes
    start = np.concatenate([[1.0], np.zeros(classes)])
    return float(minimize(loss, start, jac=True, bounds=bounds).fun)
