"""What is measured of predictions."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch.nn import functional


def score(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> dict[str, float | None]:
    """Cross-entropy (nats), accuracy, balanced accuracy and AUROC from logits [n, classes] and class indices [n]."""
    tensor = torch.from_numpy(logits)
    loss = float(functional.cross_entropy(tensor, torch.from_numpy(targets)))
    if not math.isfinite(loss):
        return dict.fromkeys(("loss", "accuracy", "balanced_accuracy", "auroc"))
    predicted = logits.argmax(axis=1)
    probabilities = torch.softmax(tensor.double(), dim=1).numpy()
    classes = np.unique(targets)
    return {
        "loss": loss,
        "accuracy": float((predicted == targets).mean()),
        "balanced_accuracy": float(np.mean([(predicted[targets == index] == index).mean() for index in classes])),
        "auroc": float(np.mean([auroc(targets == index, probabilities[:, index]) for index in classes]))
        if 1 < len(classes) == logits.shape[1]
        else None,
    }


def auroc(positive: NDArray[np.bool_], values: NDArray[np.float64]) -> float:
    """The chance that a positive has a higher value than a negative, ties counting half (the Mann-Whitney statistic).

    scikit-learn's takes half a second to load and milliseconds a call, more than an epoch of a head-only trial.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    n_positive = int(positive.sum())
    above = float(ranks[inverse][positive].sum()) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * (len(positive) - n_positive))


def calibrated_loss(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float | None:
    """Cross-entropy (nats) left when logits [n, classes] are scaled and shifted by class as serves them best.

    Early in fine-tuning, batch norm's lagging statistics put logits out of scale; what they tell apart is seen sooner
    than their plain cross-entropy shows. One image's worth of label smoothing keeps it from 0. Null where a logit is
    not finite.
    """
    if not np.isfinite(logits).all():
        return None
    centred = logits.astype(np.float64) - logits.mean(axis=0)  # far from it the search for the best shifts ends early
    scale = float(np.abs(centred - centred.mean(axis=1, keepdims=True)).max()) or 1.0
    inputs = torch.from_numpy(centred) / scale
    wanted = torch.from_numpy(targets)
    smoothing = 1 / (len(targets) + 2)  # else classes that are told apart without a fault would have no best scale

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        tensor = torch.from_numpy(parameters).requires_grad_()
        found = functional.cross_entropy(inputs * tensor[0] + tensor[1:], wanted, label_smoothing=smoothing)
        (gradient,) = torch.autograd.grad(found, tensor)
        return float(found.detach()), gradient.numpy()

    bounds = [(0.0, None)] + [(None, None)] * logits.shape[1]
    start = np.concatenate([[1.0], np.zeros(logits.shape[1])])
    return float(minimize(loss, start, jac=True, bounds=bounds).fun)
