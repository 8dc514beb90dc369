"""Decoded images with their labels and splits, and how they become a network's input."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tuning.record.targets import class_names, encoded
from tuning.training import backbones
from tuning.training.augment import augment
from tuning.training.features import to_device

Indices = NDArray[np.int64]
# From indices of images, their rows of the epoch's table (None: not augmented) and a policy to a network's input.
Prepare = Callable[[Indices, Tensor | None, str], Tensor]


@dataclass(frozen=True)
class Data:
    """Decoded images with their labels and splits."""

    images: NDArray[np.uint8] | Tensor  # [n, side, side, channels], channels 1 or 3; memory-mapped, or on a GPU
    labels: NDArray[np.int64]  # [n], index into `classes`; or [n, classes] of 1, 0 and -1 (unknown)
    train: Indices  # of the images in each split
    val: Indices
    test: Indices
    classes: tuple[str, ...]

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several of the classes."""
        return self.labels.ndim == 2


def placed(images: NDArray[np.uint8], device: torch.device, *, share: float = 1.0) -> NDArray[np.uint8] | Tensor:
    """Copy decoded images to the GPU if they take at most a quarter of its free memory; else return them unchanged.

    Args:
        share: of the GPU that this process has.
    """
    if device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] * share / 4:
        return torch.from_numpy(np.array(images)).to(device)
    return images


def join(samples: pd.DataFrame, images: NDArray[np.uint8] | Tensor) -> Data:
    """Join samples (from `samples.load_samples`) with their decoded images, in the same order."""
    assert len(samples) == len(images)
    classes = class_names(samples["label"])
    labels = encoded(samples["label"], classes)
    splits = {name: np.flatnonzero(samples["split"] == name) for name in ("train", "val", "test")}
    return Data(images, labels, **splits, classes=classes)


def train_eval_set(data: Data) -> Indices:
    """Return the training images for `train_eval_loss`: the same in all trials, as many as validation images."""
    return data.train[np.random.default_rng(0).permutation(len(data.train))[: len(data.val)]]


def preparer(images: NDArray[np.uint8] | Tensor, model: nn.Module, device: torch.device) -> Prepare:
    """Return a function that makes a model's input [batch, 3, side, side], augmented and normalised."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in backbones.input_mean_std(model))

    def prepare(indices: Indices, table: Tensor | None, policy: str) -> Tensor:
        if isinstance(images, Tensor):
            chosen = images[to_device(indices, device)]
        else:
            chosen = to_device(images[indices], device)
        pixels = chosen.permute(0, 3, 1, 2).float() / 255
        if table is not None:
            pixels = augment(pixels, table, policy)
        return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)

    return prepare
