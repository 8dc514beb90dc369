"""Images unlike all that a model was made from, told by the statistics of its features.

A classifier divides whatever it is given among its classes, also a photograph of a cat. What its layers see of an image
shows it: the means and deviations of their channels, which fine-tuning changes little, are compared with those of the
training images (Mahalanobis distance, Lee et al. 2018, https://arxiv.org/abs/1807.03888). The features that the
classifier takes tell less: fine-tuning leaves in them little but the classes (benchmarks/README.md).
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tuning.record.tables import replacing
from tuning.settings.config import InputError

if TYPE_CHECKING:  # torch and timm take seconds to load, and --help needs neither
    from torch import nn

    from tuning.training.dataset import Prepare

Reals = NDArray[np.float32]
Fitted = dict[str, NDArray[Any]]

FILE = "familiar.npz"  # in a model folder
MOST_IMAGES = 1000  # of training, and of validation: random ones
LEVEL = 0.99  # share of the validation images that are familiar
STAGES = (1, 2, 3)  # from the input, counted from 0, whose inputs are seen
SHRINK = 0.1  # of the covariance towards that of independent features, for images are few


def taps(network: "nn.Module", image_size: int) -> list[str]:
    """Return the modules whose inputs are seen: the first of each of `STAGES`."""
    from tuning.training import backbones

    stages = backbones.stages(network, image_size)
    first: dict[int, str] = {}

    def note(stage: int, name: str) -> None:
        first.setdefault(stage, name)

    handles = []
    for stage in (stage for stage in STAGES if stage < len(stages)):
        for name in {parameter.rpartition(".")[0] for parameter in stages[stage]}:
            module = network.get_submodule(name)
            handles.append(module.register_forward_pre_hook(lambda _, given, on=(stage, name): note(*on)))
    try:
        with backbones.evaluating(network):
            network(backbones.zero_images(network, 1, image_size))
    finally:
        for handle in handles:
            handle.remove()
    return list(first.values())


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


def joined(found: list[list[Reals]], images: int) -> Reals:
    """Return recorded features as one array [images, features].

    Raises:
        ValueError: a module sees something else than images, such as parts of them.
    """
    each = [np.concatenate(batches) for batches in found]
    if any(len(features) != images for features in each):
        raise ValueError(
            f"its modules see {' and '.join(str(len(features)) for features in each)} parts of {images} images"
        )
    return np.concatenate(each, axis=1)


def fit(trained: Reals, validated: Reals, names: list[str]) -> Fitted:
    """Return what tells unfamiliar images.

    Args:
        trained: features of training images [n, features].
        validated: of validation images, or of others of training if there are none.
        names: of the modules, from `taps`.
    """
    mean, scale = trained.mean(axis=0), trained.std(axis=0)
    scale = np.where(scale > 1e-6 * max(float(scale.max()), 1e-12), scale, np.inf)  # a constant feature tells nothing
    centred = ((trained - mean) / scale).astype(np.float64)
    size = centred.shape[1]
    covariance = centred.T @ centred / len(centred)
    covariance = (1 - SHRINK) * covariance + SHRINK * np.eye(size) * max(float(np.trace(covariance)) / size, 1e-12)
    fitted: Fitted = {
        "mean": mean,
        "scale": scale.astype(np.float32),
        "factor": np.linalg.cholesky(np.linalg.inv(covariance)).astype(np.float32),
        "limit": np.ones(1, dtype=np.float32),
        "taps": np.array(names),
    }
    limit = np.quantile(unfamiliar(fitted, validated), LEVEL, method="higher")
    return fitted | {"limit": np.array([max(float(limit), 1e-12)], dtype=np.float32)}


def unfamiliar(fitted: Fitted, features: Reals) -> NDArray[np.float64]:
    """Return how unlike the training images others are [images]: above 1, more than nearly all of validation."""
    centred = ((features - fitted["mean"]) / fitted["scale"]).astype(np.float64)
    found: NDArray[np.float64] = np.linalg.norm(centred @ fitted["factor"], axis=1) / fitted["limit"][0]
    return found


def predicted(
    network: "nn.Module", prepare: "Prepare", rows: NDArray[np.int64], fitted: Fitted | None
) -> tuple[Reals, NDArray[np.float64] | None]:
    """Return the logits [rows, classes] of some images, and `unfamiliar` of each; None if nothing was fitted.

    Args:
        network: on the device of the prepared images.
        prepare: of `dataset.preparer`.
        rows: of the images.
        fitted: of `fit`, for this network.
    """
    from tuning.training.scores import predict_images

    with recorded(network, [] if fitted is None else fitted["taps"].tolist()) as seen:
        logits = predict_images(network, prepare, rows)
    return logits, None if fitted is None else unfamiliar(fitted, joined(seen, len(rows)))


def write(folder: Path, fitted: Fitted) -> None:
    """Write what `fit` returned into a model folder."""
    with replacing(folder / FILE) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, **fitted)  # type: ignore[arg-type]


def read(folder: Path) -> Fitted | None:
    """Return what was written; None in a folder of an older version.

    Raises:
        InputError: the file is damaged.
    """
    if not (folder / FILE).exists():
        return None
    try:
        with np.load(folder / FILE, allow_pickle=False) as found:
            return {name: found[name] for name in ("mean", "scale", "factor", "limit", "taps")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{folder / FILE}: is damaged ({error}); restore it from a copy") from None
