"""The frozen part of a trial's model: what it gives to the trained part, from the cache or by a pass."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuning.training.features import CHUNK, Array, FeatureCache, Key, loaded, stored
from tuning.training.models import Network

BLOCK = 256  # about so many images go through the prefix at once where their outputs are not cached
HELD_BYTES = 2**28  # vectors up to this size are held in memory, on the trial's device
Prepare = Callable[[NDArray[np.int64], Tensor | None, str], Tensor]
Fetch = Callable[[NDArray[np.int64]], Tensor]


@dataclass(frozen=True)
class Inputs:
    """What the trained part of a model is given for a set of images, batch by batch."""

    fetch: Callable[[NDArray[np.int64]], Tensor]  # from positions in the set
    hits: int | None = None  # images of the set that needed no pass through the prefix; null where none are kept
    blocks: bool = False  # whether `fetch` passes images through the prefix, CHUNK at a time

    def batches(self, positions: NDArray[np.int64], size: int) -> Iterator[Tensor]:
        """Inputs [size, ...] of the images at `positions`, in this order; the last batch may be smaller."""
        block = math.lcm(size, CHUNK) if self.blocks else size
        if block > max(size, BLOCK):
            block = size * math.ceil(BLOCK / size)
        for first in range(0, len(positions), block):
            yield from torch.split(self.fetch(positions[first : first + block]), size)


class Frozen:
    """The frozen part of a trial's model, which makes the trained part's inputs for any set of images.

    Args:
        network: the model; its frozen part is in eval mode whenever inputs are asked for.
        depth: stages unfrozen.
        prepare: from indices of images (and their rows of the epoch's table, and the policy) to the network's input.
        autocast: what the model is run under.
        device: of the model.
        cache: where outputs are kept; null: nowhere.
        backbone: names them in the cache.
        weights: names them in the cache.
    """

    def __init__(
        self,
        network: Network,
        depth: int,
        prepare: Prepare,
        autocast: torch.autocast,
        device: torch.device,
        cache: FeatureCache | None,
        *,
        backbone: str,
        weights: str,
    ):
        self._network, self._prepare = network, prepare
        self._autocast, self._device, self._cache = autocast, device, cache
        self._cut = network.cut(depth)
        self._key = Key(backbone, weights, network.image_size, depth, "", "none", None)
        self.trained: Callable[[Tensor], Tensor] = network.model if self._cut is None else self._cut.suffix
        self.head_only = depth == 0 and self._cut is not None
        self.prefix_seconds = 0.0  # spent in frozen layers so far, or waiting for another trial's
        self.data_seconds = 0.0  # spent on reading and augmenting so far

    def inputs(
        self,
        indices: NDArray[np.int64],
        table: Tensor | None = None,
        policy: str = "none",
        moment: tuple[int, int] | None = None,
    ) -> Inputs:
        """The trained part's inputs for a set of images; outputs that are to be kept are computed here.

        Args:
            indices: of images.
            table: their rows of the epoch's table; null: no augmentation.
            policy: of the augmentation.
            moment: seed and epoch that drew the table.
        """
        prepare = partial(self._prepared, indices, table, policy)
        if self._cut is None:
            return Inputs(prepare)
        found = None
        if self._cache is not None:
            images = hashlib.sha256(indices.tobytes()).hexdigest()
            key = replace(self._key, images=images, policy=policy, moment=None if policy == "none" else moment)
            outputs = partial(self._outputs, key, len(indices), prepare)
            with self._prefix_timed():
                found = self._cache.get(key, len(indices), outputs)
        if found is None:
            return Inputs(partial(self._computed, prepare), blocks=True)
        return Inputs(self._reader(found[0]), hits=len(indices) if found[1] else 0)

    def _prepared(
        self, indices: NDArray[np.int64], table: Tensor | None, policy: str, positions: NDArray[np.int64]
    ) -> Tensor:
        started = time.perf_counter()
        rows = None if table is None else table[torch.from_numpy(positions)]
        images = self._prepare(indices[positions], rows, policy)
        self.data_seconds += time.perf_counter() - started
        return images

    def _computed(self, prepare: Fetch, positions: NDArray[np.int64]) -> Tensor:
        with self._prefix_timed():
            return torch.cat([self._pass(prepare, part) for part in _chunks(positions)])

    def _pass(self, prepare: Fetch, positions: NDArray[np.int64]) -> Tensor:
        """Outputs of at most CHUNK images."""
        assert self._cut is not None
        images = prepare(_filled(positions))
        with self._autocast:
            return self._cut.prefix(images)[: len(positions)]

    def _outputs(self, key: Key, count: int, prepare: Fetch) -> Iterator[Array]:
        """Outputs of all images, from those of a cut further from the head where they are there."""
        assert self._cut is not None and self._cache is not None
        for depth in range(key.depth + 1, len(self._network.stages)):
            known, further = self._cache.find(replace(key, depth=depth)), self._network.cut(depth)
            if known is not None and further is not None:
                break
        else:
            for positions in _chunks(np.arange(count)):
                yield stored(self._pass(prepare, positions))
            return
        for positions in _chunks(np.arange(count)):
            features = loaded(known[_filled(positions)], self._device)
            with self._autocast:
                derived = self._cut.stop(partial(further.suffix, features))
            yield stored(derived[: len(positions)])

    def _reader(self, array: Array) -> Fetch:
        started = time.perf_counter()
        held = loaded(np.array(array), self._device) if array.ndim == 2 and array.nbytes <= HELD_BYTES else None
        self.data_seconds += time.perf_counter() - started

        def fetch(positions: NDArray[np.int64]) -> Tensor:
            if held is not None:
                return held[torch.from_numpy(positions).to(self._device)]
            started = time.perf_counter()
            features = loaded(array[positions], self._device)
            self.data_seconds += time.perf_counter() - started
            return features

        return fetch

    @contextmanager
    def _prefix_timed(self) -> Iterator[None]:
        started, data_seconds = time.perf_counter(), self.data_seconds
        yield
        self.prefix_seconds += time.perf_counter() - started - (self.data_seconds - data_seconds)


def _chunks(positions: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for first in range(0, len(positions), CHUNK):
        yield positions[first : first + CHUNK]


def _filled(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """CHUNK positions: the last one repeated where there are fewer."""
    return np.pad(positions, (0, CHUNK - len(positions)), mode="edge")


def mixed_precision(device: torch.device) -> torch.autocast:
    """What models are run under: on CUDA bfloat16 where the GPU has it, else float16; on the CPU nothing."""
    cuda = device.type == "cuda"
    half = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.autocast(device.type, dtype=half, enabled=cuda)
