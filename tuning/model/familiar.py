"""Images unlike all that a model was made from, told by the statistics of its features.

A classifier divides whatever it is given among its classes, also a photograph of a cat. Its features show it: those
that the classifier takes, and the means and deviations of the channels further down, which fine-tuning changes little.
Their principal components and what these leave over are compared with those of the training images (Mahalanobis
distance, Lee et al. 2018, https://arxiv.org/abs/1807.03888, and reconstruction error).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tuning.record.tables import replacing

if TYPE_CHECKING:  # torch and timm take seconds to load, and --help needs neither
    from torch import nn

Reals = NDArray[np.float32]
Fitted = dict[str, NDArray[Any]]

FILE = "familiar.npz"  # in a model folder
COMPONENTS = 64  # at most, and at most a tenth of the images
MOST_IMAGES = 1000  # of training, random ones
LEVEL = 0.99  # share of the validation images that are familiar by each of the two measures
STAGE = 3  # from the input, counted from 0: the channels that it takes


def taps(network: "nn.Module", image_size: int) -> list[str]:
    """Return the modules whose inputs are the features: the first of a stage in the middle, and the classifier."""
    from tuning.training import backbones

    stages = backbones.stages(network, image_size)
    middle = {name.rpartition(".")[0] for name in stages[min(STAGE, len(stages) - 1)]}
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: order.append(name))
        for name, module in network.named_modules()
        if name in middle
    ]
    try:
        with backbones.evaluating(network):
            network(backbones.zero_images(network, 1, image_size))
    finally:
        for handle in handles:
            handle.remove()
    return [*order[:1], backbones.classifier_name(network)]


@contextmanager
def recorded(network: "nn.Module", names: list[str]) -> Iterator[list[list[Reals]]]:
    """Record the features of all images that pass through a network while the context lasts, batch by batch."""
    found: list[list[Reals]] = [[] for _ in names]

    def keep(place: int, given: tuple[Any, ...]) -> None:
        values = given[0].detach().float()
        if values.ndim == 4:
            channels_first = values.shape[2] == values.shape[3]  # images are square
            values = values.flatten(2) if channels_first else values.flatten(1, 2).transpose(1, 2)
        elif values.ndim == 3:  # tokens
            values = values.transpose(1, 2)
        if values.ndim == 3:
            import torch

            values = torch.cat([values.mean(dim=2), values.std(dim=2, correction=0)], dim=1)
        found[place].append(values.cpu().numpy())

    handles = [
        network.get_submodule(name).register_forward_pre_hook(lambda _, given, place=place: keep(place, given))
        for place, name in enumerate(names)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def joined(found: list[list[Reals]]) -> Reals:
    """Return recorded features as one array [images, features]."""
    return np.concatenate([np.concatenate(batches) for batches in found], axis=1)


def fit(trained: Reals, validated: Reals, names: list[str]) -> Fitted:
    """Return what tells unfamiliar images.

    Args:
        trained: features of training images [n, features].
        validated: of validation images, or of others of training if there are none.
        names: of the modules, from `taps`.
    """
    mean, scale = trained.mean(axis=0), trained.std(axis=0)
    scale = np.where(scale > 1e-6 * max(float(scale.max()), 1e-12), scale, np.inf)  # a constant feature tells nothing
    centred = (trained - mean) / scale
    number = max(1, min(COMPONENTS, len(trained) // 10, trained.shape[1]))
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    spread = values[:number] / np.sqrt(max(len(trained) - 1, 1))
    fitted: Fitted = {
        "mean": mean,
        "scale": scale.astype(np.float32),
        "vectors": (vectors[:number] / np.maximum(spread, 1e-6)[:, None]).astype(np.float32),
        "back": (vectors[:number] * np.maximum(spread, 1e-6)[:, None]).astype(np.float32),
        "limits": np.ones(2, dtype=np.float32),
        "taps": np.array(names),
    }
    fitted["limits"] = np.quantile(_measures(fitted, validated), LEVEL, axis=0, method="higher").astype(np.float32)
    return fitted


def unfamiliar(fitted: Fitted, features: Reals) -> NDArray[np.float64]:
    """Return how unlike the training images others are [images]: above 1, more than nearly all of validation."""
    found: NDArray[np.float64] = (_measures(fitted, features) / np.maximum(fitted["limits"], 1e-12)).max(axis=1)
    return found


def _measures(fitted: Fitted, features: Reals) -> NDArray[np.float64]:
    """Return the distance in the components, and the length of what they leave over [images, 2]."""
    centred = ((features - fitted["mean"]) / fitted["scale"]).astype(np.float64)
    within = centred @ fitted["vectors"].T
    left = centred - within @ fitted["back"]
    return np.stack([np.sqrt(np.square(within).mean(axis=1)), np.sqrt(np.square(left).mean(axis=1))], axis=1)


def write(folder: Path, fitted: Fitted) -> None:
    """Write what `fit` returned into a model folder."""
    with replacing(folder / FILE) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, **fitted)  # type: ignore[arg-type]


def read(folder: Path) -> Fitted | None:
    """Return what was written; None in a folder of an older version."""
    if not (folder / FILE).exists():
        return None
    with np.load(folder / FILE, allow_pickle=False) as found:
        return dict(found)
