"""Exponentially averaged weights, which say sooner than the weights themselves what a trial will come to."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Averaged:
    """An average of a model's tensors after each optimizer step, over about an epoch; of all steps while they are few.

    Args:
        model: whose tensors are averaged.
        names: of those that change; batch-norm statistics among them.
        epoch_steps: optimizer steps of an epoch.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], epoch_steps: int):
        tensors = model.state_dict()
        self._tensors = {name: tensors[name] for name in names}
        self._share = 1 - math.exp(-1 / epoch_steps)
        self._steps = 0
        self.mean = {name: torch.empty_like(tensor) for name, tensor in self._tensors.items()}

    def restore(self, mean: Mapping[str, Tensor], steps: int) -> None:
        """Go on from what `mean` was after so many steps."""
        assert mean.keys() == self.mean.keys()
        self._steps = steps
        for name, tensor in mean.items():
            self.mean[name].copy_(tensor)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the tensors as they are now."""
        self._steps += 1
        share = max(self._share, 1 / self._steps)
        for name, tensor in self._tensors.items():
            if self._steps == 1 or not tensor.is_floating_point():
                self.mean[name].copy_(tensor)
            else:
                self.mean[name].lerp_(tensor, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the averages for its tensors; it has its own again afterwards, to the bit."""
        with torch.no_grad():
            own = {name: tensor.clone() for name, tensor in self._tensors.items()}
            for name, tensor in self._tensors.items():
                tensor.copy_(self.mean[name])
            try:
                yield
            finally:
                for name, tensor in self._tensors.items():
                    tensor.copy_(own[name])
