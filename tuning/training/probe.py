"""Linear probes: a linear classifier on a backbone's frozen features, which costs a pass or two over the images.

They say what each backbone is worth before the search proper, and give a head to start fine-tuning from: linear
probing, then fine-tuning (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tuning.settings.config import InputError, TrialConfig
from tuning.training.dataset import Data, preparer, train_eval_set
from tuning.training.features import FeatureCache
from tuning.training.frozen import Frozen, mixed_precision
from tuning.training.models import Models, Network
from tuning.training.scores import score

DECAYS = (1.0, 0.1, 0.01, 0.001)  # L2 penalties of the standardized features' weights, the strongest first
MOST_ITERATIONS = 100  # of L-BFGS, for each penalty


def fit_head(features: Tensor, targets: Tensor, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logistic regressions by L-BFGS on standardized features, one for each of `DECAYS`.

    Args:
        features: [n, width], float.
        targets: class indices [n].
        classes: how many.

    Yields:
        Weight [classes, width] and bias [classes] that take the features as they are.
    """
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
    inputs = (features - mean) / scale
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    for decay in DECAYS:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=MOST_ITERATIONS, line_search_fn="strong_wolfe")

        def loss(optimizer: torch.optim.LBFGS = optimizer, decay: float = decay) -> Tensor:
            optimizer.zero_grad()
            found = functional.cross_entropy(inputs @ weight.T + bias, targets) + decay / 2 * weight.square().sum()
            found.backward()  # type: ignore[no-untyped-call]
            return found

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        folded = weight.detach() / scale
        yield folded, bias.detach() - folded @ mean


def probed_head(
    network: Network,
    config: TrialConfig,
    data: Data,
    *,
    device: torch.device,
    weights: Path | None,
    features: FeatureCache | None,
) -> tuple[Tensor, Tensor, Frozen, Tensor, Tensor]:
    """The linear classifier on a network's frozen features whose penalty serves validation best.

    Args:
        network: as it was built; it is put in eval mode.
        config: names the backbone and the seed.
        data: decoded images; neither training nor validation images are augmented.
        device: of the network.
        weights: the backbone's weight file.
        features: keeps the frozen layers' outputs.

    Returns:
        Weight [classes, width], bias [classes], what makes the features, and training's and validation's [n, width].

    Raises:
        InputError: the network can't be cut below its classifier.
    """
    network.model.eval()
    frozen = Frozen(
        network,
        0,
        preparer(data.images, config.backbone, device),
        mixed_precision(device),
        device,
        features,
        backbone=config.backbone,
        weights=f"random {config.seed}" if weights is None else str(weights),
    )
    if not frozen.head_only:
        raise InputError(f"{config.backbone}: can't be cut below its classifier, so it can't be probed")
    labels = torch.from_numpy(data.labels).to(device)
    fitted_on = np.setdiff1d(
        data.train, data.val
    )  # a final model is trained on both: the penalty is still chosen on val
    train, val = (vectors(frozen, indices) for indices in (fitted_on, data.val))
    best, least = None, math.inf
    for weight, bias in fit_head(train, labels[fitted_on], len(data.classes)):
        loss = float(functional.cross_entropy(val @ weight.T + bias, labels[data.val]))
        if best is None or not loss >= least:
            best, least = (weight, bias), loss
    assert best is not None
    return *best, frozen, train, val


def vectors(frozen: Frozen, indices: NDArray[np.int64]) -> Tensor:
    """Frozen features [n, width] of images that aren't augmented, in float32."""
    batches = frozen.inputs(indices).batches(np.arange(len(indices)), 4096)
    return torch.cat([batch.float() for batch in batches])


def probe(
    config: TrialConfig,
    data: Data,
    *,
    device: torch.device,
    weights: Path | None,
    features: FeatureCache | None = None,
    models: Models | None = None,
) -> dict[str, Any]:
    """A backbone's linear probe as the row of its only epoch; arguments as in `finetune`, errors of `probed_head`."""
    started = time.perf_counter()
    network = (models or Models()).get(
        config.backbone,
        classes=len(data.classes),
        image_size=config.image_size,
        seed=config.seed,
        weights=weights,
        device=device,
    )
    network.begin(0, batch_norm="frozen", head_dropout=0.0)
    weight, bias, frozen, train, val = probed_head(
        network, config, data, device=device, weights=weights, features=features
    )
    train_eval = train_eval_set(data)
    features_of = {
        "train": (train, data.train),
        "train_eval": (vectors(frozen, train_eval), train_eval),
        "val": (val, data.val),
    }
    scores = {
        name: score((found @ weight.T + bias).cpu().numpy(), data.labels[indices])
        for name, (found, indices) in features_of.items()
    }
    seconds = time.perf_counter() - started
    return {
        "epoch": 1,
        "train_loss": scores["train"]["loss"],
        "train_eval_loss": scores["train_eval"]["loss"],
        **{f"val_{name}": value for name, value in scores["val"].items()},
        "early_loss": None,
        "learning_rate": None,
        "images": len(data.train),
        "seconds": seconds,
        "data_seconds": frozen.data_seconds,
        "prefix_seconds": frozen.prefix_seconds,
        "train_seconds": seconds - frozen.data_seconds - frozen.prefix_seconds,
        "evaluate_seconds": 0.0,
        "cache_hits": None,
        "peak_memory_mb": None,
        "gpu_memory_mb": None,
        "batch_size": None,
        "micro_batch": None,
        "trained_parameters": weight.numel() + bias.numel(),
        "parameters": sum(parameter.numel() for parameter in network.model.parameters()),
        "latency_ms": network.latency_ms(mixed_precision(device)),
        "unfreeze_depth": 0,
        "ends": "diverged" if scores["val"]["loss"] is None else "completed",
        "reason": "a linear probe",
    }
