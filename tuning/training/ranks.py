"""A process's part in training on several devices, each of which computes its part of every batch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tuning.training.dataset import Indices


class _Trained(nn.Module):
    """The trained part of a model as a module of its own, which DistributedDataParallel asks for."""

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, inputs: Tensor) -> Tensor:
        return self._forward(inputs)


@dataclass(frozen=True)
class Ranks:
    """This process's number among all that train one model, in torch's default process group. Alone, all is its own."""

    rank: int = 0
    size: int = 1

    def own(self, count: int) -> slice:
        """Return which of `count` items are this process's."""
        first, last = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(first, last)

    def shared(self, model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a model's trained part such that a backward pass leaves gradients of the mean of all ranks' losses."""
        if self.size == 1:
            return forward
        return DistributedDataParallel(_Trained(model, forward))

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a value over all ranks, with which it is overwritten."""
        if self.size > 1:
            distributed.all_reduce(value)
        return value

    def logits(self, of: Callable[[Indices], NDArray[np.float32]], indices: Indices) -> NDArray[np.float32]:
        """Return logits [n, classes] of all images, of which each rank computes its own."""
        found = of(indices[self.own(len(indices))])
        if self.size == 1:
            return found
        parts: list[NDArray[np.float32]] = [found] * self.size
        distributed.all_gather_object(parts, found)
        return np.concatenate(parts)


ALONE = Ranks()
