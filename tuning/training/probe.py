"""Linear probes: a linear classifier on a backbone's frozen features, which costs a pass or two over the images.

They rank the backbones before the search itself, and give a head to start fine-tuning from: linear probing, then
fine-tuning (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuning.settings.config import InputError, TrialConfig
from tuning.settings.values import Weights
from tuning.training.dataset import Data, train_eval_set
from tuning.training.features import Cache
from tuning.training.frozen import Frozen
from tuning.training.models import Models, Network
from tuning.training.scores import loss_sum, mean_loss, score, target_weight

# L2 penalties of the standardized features' weights, the strongest first: with few images these are needed, for a
# classifier of hundreds of features is overconfident at 1.
DECAYS = (1000.0, 100.0, 10.0, 1.0, 0.1, 0.01, 0.001)
MAX_ITERATIONS = 100  # of L-BFGS, for each penalty


def fit_head(features: Tensor, targets: Tensor, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Fit logistic regressions of targets on standardized features [n, width], one for each penalty in `DECAYS`.

    Targets are as in `scores.target_weight`; of labels, each has a regression of its own.

    Yields:
        Weight [classes, width] and bias [classes] for features that are not standardized.
    """
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
    inputs = (features - mean) / scale
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    share = classes if targets.ndim == 2 else 1  # the loss is a mean over labels, the penalty a sum
    for penalty in DECAYS:
        decay = penalty / share
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

        def loss(optimizer: torch.optim.LBFGS = optimizer, decay: float = decay) -> Tensor:
            optimizer.zero_grad()
            found = _loss(inputs @ weight.T + bias, targets) + decay / 2 * weight.square().sum()
            found.backward()  # type: ignore[no-untyped-call]
            return found

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        folded = weight.detach() / scale
        yield folded, bias.detach() - folded @ mean


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return loss_sum(logits, targets) / target_weight(targets, None)


def probed_head(network: Network, data: Data, features: Cache | None) -> tuple[Tensor, Tensor, Frozen, Tensor, Tensor]:
    """Fit a linear classifier on a network's frozen features, with the penalty of the lowest validation loss.

    Images are not augmented, and the network is left in eval mode.

    Returns:
        Weight [classes, width], bias [classes], the frozen part, and the features [n, width] of training (without
        images that are in validation as well) and of validation.

    Raises:
        InputError: the network can't be cut below its classifier.
    """
    network.model.eval()
    frozen = Frozen(network, 0, data.images, features)
    if not frozen.head_only:
        raise InputError(f"{network.backbone}: can't be probed, since it can't be cut below its classifier")
    labels = torch.from_numpy(data.labels).to(network.device)
    # A final model is trained on both splits: the penalty is still chosen on validation.
    fitted_on = np.setdiff1d(data.train, data.val)
    train, val = frozen.vectors(fitted_on), frozen.vectors(data.val)
    best, least = None, math.inf
    for weight, bias in fit_head(train, labels[fitted_on], len(data.classes)):
        loss = float(_loss(val @ weight.T + bias, labels[data.val]))
        if best is None or not loss >= least:
            best, least = (weight, bias), loss
    assert best is not None
    return *best, frozen, train, val


def probe(
    config: TrialConfig,
    data: Data,
    *,
    device: torch.device,
    weights: Weights | None,
    features: Cache | None = None,
    models: Models | None = None,
) -> dict[str, Any]:
    """Return a backbone's linear probe as the row of one epoch; arguments as `finetune`, errors as `probed_head`."""
    started = time.perf_counter()
    shape = {"classes": len(data.classes), "image_size": config.image_size}
    network = (models or Models()).get(config.backbone, **shape, seed=config.seed, weights=weights, device=device)
    network.begin(0, batch_norm="frozen", head_dropout=0.0)
    weight, bias, frozen, train, val = probed_head(network, data, features)
    train_eval = train_eval_set(data)

    def logits(vectors: Tensor) -> NDArray[np.float32]:
        return (vectors @ weight.T + bias).cpu().numpy()

    train_loss = mean_loss(logits(train), data.labels[data.train])
    train_eval_loss = mean_loss(logits(frozen.vectors(train_eval)), data.labels[train_eval])
    validation = score(logits(val), data.labels[data.val])
    seconds = time.perf_counter() - started
    return {
        "epoch": 1,
        "train_loss": train_loss,
        "train_eval_loss": train_eval_loss,
        **{f"val_{name}": value for name, value in validation.items()},
        **dict.fromkeys(("early_loss", "learning_rate", "cache_hits", "batch_size", "micro_batch")),
        **dict.fromkeys(("peak_memory_mb", "gpu_memory_mb")),
        "images": len(data.train),
        "seconds": seconds,
        "data_seconds": frozen.data_seconds,
        "prefix_seconds": frozen.prefix_seconds,
        "train_seconds": seconds - frozen.data_seconds - frozen.prefix_seconds,
        "evaluate_seconds": 0.0,
        "trained_parameters": weight.numel() + bias.numel(),
        "parameters": sum(parameter.numel() for parameter in network.model.parameters()),
        "latency_ms": network.latency_ms(),
        "unfreeze_depth": 0,
        "ends": "diverged" if validation["loss"] is None else "completed",
        "reason": "a linear probe",
    }
