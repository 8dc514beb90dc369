"""Decoded images with their labels and splits, and how they become a network's input."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tuning.record.targets import class_names, encoded
from tuning.training import backbones
from tuning.training.augment import augment
from tuning.training.features import for_device, to_device

T = TypeVar("T")
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


def placed(
    images: NDArray[np.uint8] | Tensor, device: torch.device, *, share: float = 1.0
) -> NDArray[np.uint8] | Tensor:
    """Copy decoded images to the GPU if they take at most a quarter of its free memory; else return them unchanged.

    Args:
        share: of the GPU that this process has.
    """
    if isinstance(images, Tensor) or device.type != "cuda":
        return images
    fits = images.nbytes <= torch.cuda.mem_get_info(device)[0] * share / 4
    return torch.from_numpy(np.array(images)).to(device) if fits else images


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
    read, as_input = reader(images, device), normaliser(model, device)
    return lambda indices, table, policy: as_input(read(indices), table, policy)


def reader(images: NDArray[np.uint8] | Tensor, device: torch.device) -> Callable[[Indices], Tensor]:
    """Return a function that reads some images, [batch, side, side, channels], for a device: there or in memory."""
    if isinstance(images, Tensor):
        return lambda indices: images[to_device(indices, device)]
    return lambda indices: for_device(images[indices], device)


def normaliser(model: nn.Module, device: torch.device) -> Callable[[Tensor, Tensor | None, str], Tensor]:
    """Return a function that makes a model's input of what was read, its rows of the epoch's table, and a policy."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in backbones.input_mean_std(model))

    def as_input(read: Tensor, table: Tensor | None, policy: str) -> Tensor:
        chosen = read.to(device, non_blocking=device.type == "cuda")
        pixels = chosen.permute(0, 3, 1, 2).float() / 255
        if table is not None:
            pixels = augment(pixels, table, policy)
        return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)

    return as_input


def streams(images: NDArray[np.uint8] | Tensor, device: torch.device) -> bool:
    """Return whether a thread is to read images ahead: those that a GPU trains on, and that are not in its memory."""
    return device.type != "cpu" and not isinstance(images, Tensor)


def ahead(read: Callable[[Indices], T], groups: Iterable[Indices]) -> Iterator[T]:
    """Yield what is read of each group; meanwhile a thread reads the next. An error is raised in its place."""
    with ThreadPoolExecutor(1) as pool:
        following: Future[T] | None = None
        for group in groups:
            current, following = following, pool.submit(read, group)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()
