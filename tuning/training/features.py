"""Frozen prefixes' outputs, computed once: in files that a node's trials share or, on a GPU, in its memory."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A convolution's last bit depends on the number of images in a batch (seen with lite0, VGG, DenseNet and resnet18), so
# every pass through a prefix takes exactly this many: cached, derived and recomputed outputs are equal.
CHUNK = 32
GPU_CHUNK = 128  # on a GPU, whose last bits depend on more, and which is idle while it is asked for little
MOST_READING = 1.0  # outputs are kept if reading them takes at most this fraction of computing them
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Key:
    """What outputs depend on within a run, whose data are fixed."""

    backbone: str
    weights: str  # as `models.Network` names them
    image_size: int
    depth: int  # stages above the cut
    precision: str  # of the passes
    images: str  # hash of the images' indices
    policy: str
    moment: tuple[int, int] | None  # seed and epoch of the augmentation; None without it


class FeatureCache:
    """Outputs as files in one folder; beyond the budget the least recently used are deleted first.

    Files are memory-mapped, so the system keeps in memory what it has room for. A file appears whole or not at all, and
    is written once even if several trials need it at the same time: the others wait.

    Args:
        folder: on this node; created if it is missing.
        cache_bytes: budget.
        augmented: whether to keep outputs of augmented images, which only other trials use again.
    """

    def __init__(self, folder: Path, cache_bytes: int, *, augmented: bool = True):
        self._folder, self._cache_bytes, self._augmented = folder, cache_bytes, augmented
        self._refused: set[Key] = set()
        with suppress(OSError):  # else nothing is kept
            folder.mkdir(parents=True, exist_ok=True)

    def find(self, key: Key) -> Array | None:
        """Return the outputs [n, ...] if they are cached, memory-mapped; feature maps have their channels last."""
        path = self._path(key)
        try:
            array: Array = np.load(path, mmap_mode="r")
            os.utime(path)
        except OSError:  # not cached, or evicted this moment
            return None
        return array

    held_bytes = 0  # of memory

    def clear(self) -> None:
        """Free memory: there is none to free."""

    def get(self, key: Key, count: int, chunks: Callable[[], Iterator[Tensor]]) -> tuple[Array, bool] | None:
        """Return the outputs of `count` images; if they are not cached, `chunks` computes them in order, in parts.

        Returns:
            The outputs as from `find`, and whether they were cached; None if they can't be kept: they are too large for
            half the budget or for the disk, or not faster to read than to compute.
        """
        if (found := self.find(key)) is not None:
            return found, True
        family = replace(key, moment=None)
        if family in self._refused or (key.moment is not None and not self._augmented):
            return None
        path, kept = self._path(key), False
        temporary = path.with_suffix(".new")
        # A full disk or a folder without locks costs the cache, not the trial.
        with suppress(OSError), open(path.with_suffix(".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it if this process is killed
            if (found := self.find(key)) is not None:
                return found, True
            try:
                if self._write(temporary, count, chunks()):
                    os.replace(temporary, path)
                    kept = True
            finally:
                temporary.unlink(missing_ok=True)
        if not kept:
            self._refused.add(family)
            return None
        self._evict(path)
        found = self.find(key)
        return None if found is None else (found, False)

    def _write(self, path: Path, count: int, chunks: Iterator[Tensor]) -> bool:
        """Write the outputs, and return whether they are to be kept."""
        # By ordinary writes: through a memory map a full disk would kill the process.
        with open(path, "wb") as file:
            started = time.perf_counter()
            for number, chunk in enumerate(map(stored, chunks)):
                computing = time.perf_counter() - started
                if number == 0:
                    n_bytes = count * chunk[0].nbytes
                    if n_bytes > min(self._cache_bytes / 2, shutil.disk_usage(path.parent).free - n_bytes):
                        return False
                    header = {"descr": chunk.dtype.str, "fortran_order": False, "shape": (count, *chunk.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                offset = file.tell()
                file.write(np.ascontiguousarray(chunk).data)
                if number == min(2, math.ceil(count / CHUNK) - 1):  # the first chunks warm up
                    file.flush()
                    started = time.perf_counter()
                    self._read(path, offset, chunk)
                    if time.perf_counter() - started > computing * MOST_READING:
                        return False
                started = time.perf_counter()
        return True

    def _read(self, path: Path, offset: int, like: Array) -> None:
        np.fromfile(path, like.dtype, like.size, offset=offset)

    def _evict(self, kept: Path) -> None:
        files = []
        for path in self._folder.glob("*.npy"):
            with suppress(FileNotFoundError):  # another process evicted it
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._cache_bytes:
                break
            if path != kept:
                path.unlink(missing_ok=True)
                total -= size

    def _path(self, key: Key) -> Path:
        return self._folder / f"{hashlib.sha256(json.dumps(asdict(key)).encode()).hexdigest()[:32]}.npy"


class HeldOutputs:
    """Outputs of images that are not augmented, held in a GPU's memory; others are computed faster than they are read.

    They take at most a quarter of the memory that is free when the first are computed; then the least recently used go.

    Args:
        share: of the GPU that this process has.
        most_bytes: that they take in any case.
    """

    def __init__(self, device: torch.device, *, share: float = 1.0, most_bytes: int = 2**40):
        self._device, self._share, self._most_bytes = device, share, most_bytes
        self._budget: float | None = None  # in bytes; known once something is to be held
        self._held: dict[Key, Tensor] = {}

    @property
    def held_bytes(self) -> int:
        """The memory that they take now."""
        return sum(outputs.nbytes for outputs in self._held.values())

    def find(self, key: Key) -> Tensor | None:
        """Return the outputs [n, ...] if they are held."""
        found = self._held.pop(key, None)
        if found is not None:
            self._held[key] = found
        return found

    def clear(self) -> None:
        """Free memory for trials."""
        self._held.clear()

    def get(self, key: Key, count: int, chunks: Callable[[], Iterator[Tensor]]) -> tuple[Tensor, bool] | None:
        """Return the outputs as `FeatureCache.get` does; None if they are of augmented images, or too large."""
        if (found := self.find(key)) is not None:
            return found, True
        if key.moment is not None:
            return None
        if self._budget is None:
            free = torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else 2**32
            self._budget = min(free * self._share / 4, self._most_bytes)
        outputs, first = None, 0
        for part in chunks():
            if outputs is None:
                if part[0].nbytes * count > self._budget:
                    return None
                while self._held and part[0].nbytes * count + self.held_bytes > self._budget:
                    del self._held[next(iter(self._held))]
                last = part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last)
                layout = torch.channels_last if last else torch.contiguous_format
                shape = (count, *part.shape[1:])
                outputs = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
            outputs[first : first + len(part)] = part
            first += len(part)
        if outputs is None:
            return None
        self._held[key] = outputs
        return outputs, False


Cache = FeatureCache | HeldOutputs


def stored(features: Tensor) -> Array:
    """Convert features for a file: feature maps with channels last."""
    if features.ndim == 4:
        features = features.permute(0, 2, 3, 1)
    array: Array = features.numpy()
    return array


def for_device(array: Array, device: torch.device) -> Tensor:
    """Return an array as a tensor in memory from which a GPU copies while it continues to work."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(array: Array, device: torch.device) -> Tensor:
    """Copy an array in memory to a device; a GPU continues to work meanwhile."""
    return for_device(array, device).to(device, non_blocking=device.type == "cuda")


def loaded(outputs: Array | Tensor, positions: Array, device: torch.device) -> Tensor:
    """Return the features at some positions of outputs, from memory or a file that is mapped there, or on a GPU."""
    if isinstance(outputs, Tensor):
        return outputs[to_device(positions, device)]
    features = torch.from_numpy(outputs[positions])
    return features.permute(0, 3, 1, 2) if features.ndim == 4 else features
