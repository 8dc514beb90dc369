"""Outputs of frozen prefixes: computed once, kept in files, and shared by the trials of a node."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuning.settings.config import InputError

# A convolution's last bit depends on how many images it is given (seen with lite0, VGG, DenseNet and resnet18), but not
# on which, so every pass through a prefix takes exactly this many: cached, derived and recomputed outputs are equal.
CHUNK = 32
MOST_READING = 1.0  # outputs are kept where reading them takes less than this share of computing them
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Key:
    """What outputs depend on, within a run (whose data are fixed)."""

    backbone: str
    weights: str  # file, or the seed of random ones
    image_size: int
    depth: int  # stages above the cut
    images: str  # hash of the images' indices
    policy: str
    moment: tuple[int, int] | None  # seed and epoch of the augmentation; null where there is none


@contextmanager
def run_folder(cache: Path, run: Path) -> Iterator[Path]:
    """An empty folder for the outputs of one run, deleted when the run ends; what killed runs left goes as well.

    Args:
        cache: as `images.cache_folder` gives it.
        run: the run's folder, which names it.

    Raises:
        InputError: another process works on the same run.
    """
    folders = cache / "features"
    folders.mkdir(parents=True, exist_ok=True)
    name = f"{run.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"
    for lock in {*folders.glob("*.lock"), folders / f"{name}.lock"}:
        with open(lock, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # that run is alive
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            if lock.stem != name:
                lock.unlink(missing_ok=True)
    folder, lock = folders / name, folders / f"{name}.lock"
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run}: another process works on it; wait for it or stop it") from None
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():  # else a killed worker was still writing: the next run cleans up
                lock.unlink(missing_ok=True)


class FeatureCache:
    """Outputs as files of one folder, the least recently used going first beyond the budget.

    Files are read through the memory map, so the system keeps in memory what it has room for. A file appears whole or
    not at all, and is written once even if several trials want it at the same time: the others wait.

    Args:
        folder: on this node; made where it is missing.
        cache_bytes: budget.
        device: where outputs are used: what reading them costs is measured up to there.
        augmented: whether to keep outputs of augmented images, which only other trials use again.
    """

    def __init__(self, folder: Path, cache_bytes: int, device: torch.device | None = None, *, augmented: bool = True):
        self._folder, self._cache_bytes, self._augmented = folder, cache_bytes, augmented
        self._device = device or torch.device("cpu")
        self._refused: set[Key] = set()
        with suppress(OSError):  # nothing is kept then
            folder.mkdir(parents=True, exist_ok=True)

    def find(self, key: Key) -> Array | None:
        """The outputs [n, ...] if they are there, memory-mapped; images with channels last."""
        path = self._path(key)
        try:
            array: Array = np.load(path, mmap_mode="r")
            os.utime(path)
        except OSError:  # not there, or evicted this moment
            return None
        return array

    def get(self, key: Key, count: int, chunks: Callable[[], Iterator[Array]]) -> tuple[Array, bool] | None:
        """The outputs, computed and written if they are not there.

        Args:
            key: what they are.
            count: of images.
            chunks: computes them, in order, some images at a time.

        Returns:
            The outputs as `find` gives them, and whether they were there; null where they are not to be kept: too large
            for the budget (half of it) or the disk, or not faster to read than to compute.
        """
        found = self.find(key)
        if found is not None:
            return found, True
        if self._family(key) in self._refused or (key.moment is not None and not self._augmented):
            return None
        path = self._path(key)
        try:
            with open(path.with_suffix(".lock"), "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # given back by the system if this process is killed
                found = self.find(key)
                if found is not None:
                    return found, True
                temporary = path.with_suffix(".new")
                try:
                    worth = self._write(temporary, count, chunks())
                    if worth:
                        os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
        except OSError:  # a full disk or a folder without locks costs the cache, not the trial
            worth = False
        if not worth:
            self._refused.add(self._family(key))
            return None
        self._evict(path)
        found = self.find(key)
        return None if found is None else (found, False)

    def _write(self, path: Path, count: int, chunks: Iterator[Array]) -> bool:
        # By ordinary writes: through a memory map a full disk would kill the process.
        with open(path, "wb") as file:
            started = time.perf_counter()
            for number, chunk in enumerate(chunks):
                computing = time.perf_counter() - started
                if number == 0:
                    n_bytes = count * chunk[0].nbytes
                    if n_bytes > min(self._cache_bytes / 2, shutil.disk_usage(path.parent).free - n_bytes):
                        return False
                    header = {"descr": chunk.dtype.str, "fortran_order": False, "shape": (count, *chunk.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                offset = file.tell()
                file.write(np.ascontiguousarray(chunk).data)
                if number == min(2, math.ceil(count / CHUNK) - 1):  # the first ones warm up
                    file.flush()
                    started = time.perf_counter()
                    self._read(path, offset, chunk)
                    if time.perf_counter() - started > computing * MOST_READING:
                        return False
                started = time.perf_counter()
        return True

    def _read(self, path: Path, offset: int, like: Array) -> None:
        loaded(np.fromfile(path, like.dtype, like.size, offset=offset).reshape(like.shape), self._device)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _evict(self, kept: Path) -> None:
        files = []
        for path in self._folder.glob("*.npy"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process evicted it
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

    @staticmethod
    def _family(key: Key) -> Key:
        return replace(key, moment=None)


def stored(features: Tensor) -> Array:
    """Features as they are written: images with channels last, bfloat16 as its bits."""
    if features.ndim == 4:
        features = features.permute(0, 2, 3, 1)
    if features.dtype == torch.bfloat16:
        features = features.contiguous().view(torch.uint16)
    array: Array = features.cpu().numpy()
    return array


def to_device(array: Array, device: torch.device) -> Tensor:
    """An array in memory as a tensor; a GPU goes on working while it is copied."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def loaded(array: Array, device: torch.device) -> Tensor:
    """The inverse of `stored`, for an array in memory."""
    features = to_device(array, device)
    if features.dtype == torch.uint16:
        features = features.view(torch.bfloat16)
    return features.permute(0, 3, 1, 2) if features.ndim == 4 else features
