"""The frozen part of a trial's model: its outputs, cached or computed, which are the inputs of the trained part."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuning.training.dataset import Indices, ahead, normaliser, reader, streams
from tuning.training.device import in_float32
from tuning.training.features import CHUNK, GPU_CHUNK, Array, Cache, Key, loaded, to_device
from tuning.training.mixing import Mixing
from tuning.training.models import Network
from tuning.training.scores import evaluation_batch, predict

BLOCK = 256  # about as many images go through the prefix at once if their outputs are not cached
HELD_BYTES = 2**28  # vectors in files up to this size are held in memory
VECTORS_BATCH = 4096  # vectors evaluated at once
# From groups of positions in a set of images to each group's inputs, of the whole model or of the trained part.
Fetch = Callable[[Iterable[Indices]], Iterator[Tensor]]
Precision = Callable[[], AbstractContextManager[Any]]  # of passes through the prefix


@dataclass(frozen=True)
class Inputs:
    """Inputs of the trained part of a model for a set of images, batch by batch."""

    fetch: Fetch
    hits: int | None = None  # images whose outputs were cached; None if outputs are not cached
    chunk: int = 0  # images that `fetch` passes through the prefix at once; 0: it passes none

    def batches(self, positions: Indices, size: int) -> Iterator[Tensor]:
        """Yield inputs [size, ...] of the images at `positions`, in this order; the last batch may be smaller."""
        block = math.lcm(size, self.chunk) if self.chunk else size
        if block > max(size, BLOCK):
            block = size * math.ceil(BLOCK / size)
        for fetched in self.fetch(_parts(positions, block)):
            yield from torch.split(fetched, size)


class Frozen:
    """The frozen part of a trial's model, which makes the trained part's inputs for any set of images.

    Args:
        network: the model; its frozen part is in eval mode whenever inputs are made.
        depth: number of unfrozen stages.
        images: decoded, of all splits.
        cache: keeps outputs; None: they are computed each time.
    """

    def __init__(self, network: Network, depth: int, images: NDArray[np.uint8] | Tensor, cache: Cache | None):
        self._network, self._cache, self._cut = network, cache, network.cut(depth)
        self._chunk = CHUNK if network.device.type == "cpu" else GPU_CHUNK
        self._read, self._as_input = reader(images, network.device), normaliser(network.model, network.device)
        self._streamed = streams(images, network.device)
        self._key = Key(network.backbone, network.weights, network.image_size, depth, "float32", "", "none", None)
        self.trained: Callable[[Tensor], Tensor] = network.model if self._cut is None else self._cut.suffix
        self.head_only = depth == 0 and self._cut is not None
        self.prefix_seconds = 0.0  # spent so far in frozen layers, or waiting for another trial's
        self.data_seconds = 0.0  # spent so far on reading and augmenting

    def inputs(
        self,
        indices: Indices,
        table: Tensor | None = None,
        policy: str = "none",
        moment: tuple[int, int] | None = None,
        mixed: Mixing | None = None,
    ) -> Inputs:
        """Return the trained part's inputs for a set of images; outputs to be cached are computed here.

        Args:
            indices: of images.
            table: their rows of the epoch's table, for training; None: no augmentation, for evaluation in float32.
            policy: of the augmentation.
            moment: seed and epoch of the table.
            mixed: how the policy mixes these images with others, if it does.
        """
        prepare = partial(self._images, indices, table, policy, mixed)
        if self._cut is None:
            return Inputs(prepare)
        precision = in_float32 if table is None else self._network.training_precision
        found = None
        if self._cache is not None:
            images = hashlib.sha256(indices.tobytes()).hexdigest()
            key = replace(self._key, images=images, policy=policy, moment=None if policy == "none" else moment)
            if table is not None and self._network.half is not None:
                key = replace(key, precision=str(self._network.half))
            with self._prefix_timed():
                chunks = partial(self._outputs, key, len(indices), prepare, precision)
                found = self._cache.get(key, len(indices), chunks)
        if found is None:
            return Inputs(partial(self._computed, prepare, precision), chunk=self._chunk)
        return Inputs(self._reader(found[0]), hits=len(indices) if found[1] else 0)

    def vectors(self, indices: Indices) -> Tensor:
        """Return the inputs [n, width] of a classifier that is trained alone, in float32, without augmentation."""
        batches = self.inputs(indices).batches(np.arange(len(indices)), VECTORS_BATCH)
        return torch.cat([batch.float() for batch in batches])

    def logits(self, indices: Indices) -> NDArray[np.float32]:
        """Return logits [n, classes] of unaugmented images; the model is in eval mode."""
        size = VECTORS_BATCH if self.head_only else evaluation_batch(self._network.device)
        batches = self.inputs(indices).batches(np.arange(len(indices)), size)
        return predict(self.trained, batches)

    def _images(
        self, indices: Indices, table: Tensor | None, policy: str, mixed: Mixing | None, groups: Iterable[Indices]
    ) -> Iterator[Tensor]:
        """Yield the model's input for each group of positions; what is not on the GPU is read one group ahead."""

        def read(positions: Indices) -> list[tuple[Indices, Tensor]]:
            places = [positions] if mixed is None else [positions, mixed.partners[positions]]
            return [(each, self._read(indices[each])) for each in places]

        def view(places: Indices, pixels: Tensor) -> Tensor:
            rows = None if table is None else table[to_device(places, table.device)]
            return self._as_input(pixels, rows, policy)

        started = time.perf_counter()
        for (positions, pixels), *partners in ahead(read, groups) if self._streamed else map(read, groups):
            images = view(positions, pixels)
            if mixed is not None:
                images = mixed.of(images, view(*partners[0]), positions)
            self.data_seconds += time.perf_counter() - started
            yield images
            started = time.perf_counter()

    def _computed(self, prepare: Fetch, precision: Precision, groups: Iterable[Indices]) -> Iterator[Tensor]:
        groups = list(groups)
        images = prepare(self._filled(chunk) for group in groups for chunk in self._chunks(group))
        for positions in groups:
            with self._prefix_timed():
                passes = [self._pass(next(images), precision, len(part)) for part in self._chunks(positions)]
                outputs = torch.cat(passes)
            yield outputs

    def _pass(self, images: Tensor, precision: Precision, count: int) -> Tensor:
        """Compute the outputs of a chunk of images, and return the first `count`."""
        assert self._cut is not None
        with precision():
            return self._cut.prefix(images)[:count]

    def _outputs(self, key: Key, count: int, prepare: Fetch, precision: Precision) -> Iterator[Tensor]:
        """Compute the outputs of all images, from cached outputs of a cut further from the head if there are any."""
        assert self._cut is not None and self._cache is not None
        source = None
        for depth in range(key.depth + 1, len(self._network.stages)):
            known, further = self._cache.find(replace(key, depth=depth)), self._network.cut(depth)
            if known is not None and further is not None:
                source = known, further.suffix
                break
        chunks = list(self._chunks(np.arange(count)))
        if source is None:
            images = prepare(map(self._filled, chunks))
            yield from (self._pass(each, precision, len(chunk)) for each, chunk in zip(images, chunks, strict=True))
            return
        for positions in chunks:
            features = loaded(source[0], self._filled(positions), self._network.device)
            with precision():
                derived = self._cut.stop(partial(source[1], features))
            yield derived[: len(positions)]

    def _reader(self, outputs: Array | Tensor) -> Fetch:
        started = time.perf_counter()
        if not isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.nbytes <= HELD_BYTES:
            outputs = np.array(outputs)
        self.data_seconds += time.perf_counter() - started

        def fetch(groups: Iterable[Indices]) -> Iterator[Tensor]:
            for positions in groups:
                started = time.perf_counter()
                features = loaded(outputs, positions, self._network.device)
                self.data_seconds += time.perf_counter() - started
                yield features

        return fetch

    @contextmanager
    def _prefix_timed(self) -> Iterator[None]:
        started, data_seconds = time.perf_counter(), self.data_seconds
        yield
        self.prefix_seconds += time.perf_counter() - started - (self.data_seconds - data_seconds)

    def _chunks(self, positions: Indices) -> Iterator[Indices]:
        return _parts(positions, self._chunk)

    def _filled(self, positions: Indices) -> Indices:
        """Return a chunk of positions: the last one is repeated if there are fewer."""
        return np.pad(positions, (0, self._chunk - len(positions)), mode="edge")


def _parts(positions: Indices, size: int) -> Iterator[Indices]:
    for first in range(0, len(positions), size):
        yield positions[first : first + size]
