"""Decode every image once, into one uint8 array per data set and size, cached on disk by content."""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeAlias, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tuning.data.decoding import DECODER_VERSION, Facts, Pixels, decode
from tuning.record.storage import is_uri, readable, stored
from tuning.settings.config import InputError

DECODING = ".decoding-"  # prefix of a folder that is being written
ABANDONED_S = 3600.0  # a folder that is being written is touched every TOUCH_IMAGES, which takes seconds
TOUCH_IMAGES = 100
FACTS = pa.schema(  # of facts.parquet: the fields of `Facts`
    {"width": pa.int32(), "height": pa.int32(), "mode": pa.string(), "format": pa.string()}
    | {"bytes": pa.int64(), "notes": pa.string(), "pixels_sha256": pa.string()}
)
DISK_CURE = "free disk space or set FINETUNE_SEARCH_CACHE to a folder on a larger disk"

Decoded: TypeAlias = tuple[Pixels, Facts]
Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of cores that this process may use, or that the machine has where it can't be told (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Map over one thread per core, in order, at most four items per thread ahead of the caller.

    Threads help, since Pillow and hashlib release the interpreter's lock.
    """
    threads = cores()
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def content_hashes(
    files: Sequence[str],
    folder: Path,
    map: Callable[[Callable[[str], str], Sequence[str]], Iterable[str]] = parallel_map,
) -> list[str]:
    """Return the sha256 of each file's bytes, in hex; a file of unchanged size and time is not read again.

    Args:
        files: paths or URIs.
        folder: holds `hashes.parquet`, the hashes known so far; created if missing.
        map: as in `decode_all`.

    Raises:
        InputError: a file or `hashes.parquet` can't be read.
    """
    table = folder / "hashes.parquet"
    try:
        known = {
            (row["file"], row["size"], row["mtime_ns"], row.get("ctime_ns")): row["sha256"]
            for row in (pq.read_table(table).to_pylist() if table.is_file() else [])
        }
    except (OSError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{table}: can't be read ({error}); delete it, and it will be rebuilt") from error

    try:
        keys = _sizes_and_times(files)
        new = [key for key in dict.fromkeys(keys) if key not in known]
        found = dict(zip(new, map(_hash_file, [file for file, *_ in new]), strict=True))
    except FileNotFoundError as error:
        cure = "restore it, or give the place that the images were moved to by --data"
        raise InputError(f"{error.filename}: is missing; {cure}") from error
    except OSError as error:
        place, why = error.filename or "a storage", error.strerror or error
        raise InputError(f"{place}: can't be read ({why}); make it readable") from error
    known |= found
    if found:
        # A changed file replaces its older row.
        rows = {key[0]: (*key, digest) for key, digest in known.items()}
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".hashes-{uuid.uuid4().hex}.parquet"
        names = ["file", "size", "mtime_ns", "ctime_ns", "sha256"]
        columns = [list(column) for column in zip(*rows.values(), strict=True)]
        pq.write_table(pa.table(columns, names=names), temporary)
        os.replace(temporary, table)
    return [known[key] for key in keys]


def _sizes_and_times(files: Sequence[str]) -> list[tuple[str, int, int, int]]:
    """Each file's full name, size in bytes, and times of change in ns: the second can't be set, as by tar and rsync."""
    uris = [file for file in files if is_uri(file)]
    there = dict(zip(uris, stored(uris), strict=True))
    found: list[tuple[str, int, int, int]] = []
    for file in files:
        if file not in there:
            status = os.stat(file)
            found.append((os.path.abspath(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        elif (known := there[file]) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)
        else:
            found.append((file, *known, 0))
    return found


def _hash_file(file: str) -> str:
    with readable(file) if is_uri(file) else open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def decode_all(
    files: Sequence[str],
    hashes: Sequence[str],
    image_size: int,
    *,
    fit: str = "squash",
    drop_colour: bool = False,
    folder: Path,
    disk_cache_bytes: int,
    keep: Collection[Path] = (),
    map: Callable[[Callable[[str], Decoded | str], Sequence[str]], Iterable[Decoded | str]] = map,
) -> tuple[Path, dict[int, str]]:
    """Decode images once into `images.npy`, a uint8 array [n, side, side, channels] with 1 channel if all are grey.

    Their facts are beside it in `facts.parquet` (see `read_facts`). Images are written as they come, so memory is
    bounded; the folder appears complete or not at all.

    Args:
        files: paths of images.
        hashes: content hash of each file.
        image_size, fit, drop_colour: as in `decode`.
        folder: the cache; arrays are in its `images/<key>/`.
        disk_cache_bytes: least recently used arrays beyond this are deleted, except the one returned.
        keep: folders that aren't deleted either.
        map: calls a function on each item, in order; `parallel_map`, or one that fans out over a cluster.

    Returns:
        The array's folder, and the reason for each index that can't be decoded. If there are any, nothing is kept.

    Raises:
        InputError: the array doesn't fit on the disk.
    """
    sets = folder / "images"
    suffixes = [os.path.splitext(file)[1].lower() for file in files]  # the facts note a wrong one
    identity = [DECODER_VERSION, image_size, fit, drop_colour, list(hashes), suffixes]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    target = sets / key
    if (target / "images.npy").is_file():
        _touch(target)
        return target, {}

    sets.mkdir(parents=True, exist_ok=True)
    unfinished = sets / f"{DECODING}{uuid.uuid4().hex}"
    unfinished.mkdir()
    facts: list[Facts] = []
    unreadable: dict[int, str] = {}
    try:
        decoded = map(partial(_decode_or_reason, image_size=image_size, fit=fit, drop_colour=drop_colour), files)
        pixels = _pixels_of(decoded, facts, unreadable)
        _write_array(unfinished / "images.npy", (len(files), image_size, image_size), pixels)
        if unreadable:
            return target, unreadable
        rows = [dict(zip(FACTS.names, fact, strict=True)) for fact in facts]
        pq.write_table(pa.Table.from_pylist(rows, schema=FACTS), unfinished / "facts.parquet")
        try:
            os.rename(unfinished, target)
        except OSError:
            # Another process decoded the same set meanwhile: its array is as good.
            if not (target / "images.npy").is_file():
                raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        raise InputError(f"{unfinished}: can't be written ({error.strerror}); {DISK_CURE}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already if it was renamed
    _touch(target)
    _evict(sets, {target, *keep}, disk_cache_bytes)
    return target, {}


def open_images(folder: Path) -> Pixels:
    """Return the array of `decode_all`, memory-mapped and read-only: uint8 [n, side, side, channels]."""
    images: Pixels = np.load(folder / "images.npy", mmap_mode="r")
    return images


def read_facts(folder: Path) -> pd.DataFrame:
    """Return the facts of `decode_all`, one row per image in their order, with the fields of `Facts` as columns."""
    return pq.read_table(folder / "facts.parquet").to_pandas()


def _decode_or_reason(file: str, image_size: int, fit: str, drop_colour: bool) -> Decoded | str:
    try:
        return decode(file, image_size, fit=fit, drop_colour=drop_colour)
    except InputError as error:
        return str(error)


def _pixels_of(decoded: Iterable[Decoded | str], facts: list[Facts], unreadable: dict[int, str]) -> Iterator[Pixels]:
    """Pixels of the images that could be decoded; fills in their facts, and the reasons of the others by index."""
    for index, result in enumerate(decoded):
        if isinstance(result, str):
            unreadable[index] = result
        else:
            facts.append(result[1])
            yield result[0]


def _write_array(path: Path, shape: tuple[int, int, int], decoded: Iterable[Pixels]) -> None:
    """Write images as they come; from the first coloured one on with three channels, those before it are rewritten.

    A memory map took longer than a file, and a full disk would end the process with SIGBUS.
    """
    channels = 1
    file = _begin_array(path, (*shape, channels))
    try:
        for index, pixels in enumerate(decoded):
            if index % TOUCH_IMAGES == 0:
                os.utime(path.parent)
            if pixels.ndim == 3 and channels == 1:
                file.close()
                channels = 3
                file = _with_three_channels(path, shape)
            whole = pixels if pixels.ndim == 3 or channels == 1 else np.repeat(pixels, 3)
            file.write(whole.data)
        file.flush()
        os.fsync(file.fileno())
    finally:
        file.close()


def _begin_array(path: Path, shape: tuple[int, int, int, int]) -> BinaryIO:
    """Open a new NumPy file and write its header; pixels follow in order."""
    free_bytes = shutil.disk_usage(path.parent).free
    if math.prod(shape) > free_bytes:
        needed = f"the decoded images need {math.prod(shape):,} bytes, only {free_bytes:,} are free"
        raise InputError(f"{path.parent.parent}: {needed}; {DISK_CURE}")
    file = open(path, "wb")
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file


def _with_three_channels(path: Path, shape: tuple[int, int, int]) -> BinaryIO:
    """Replace a grey array by the same images in three channels; return the file, open for more."""
    coloured = path.with_name("coloured.npy")
    file = _begin_array(coloured, (*shape, 3))
    with open(path, "rb") as grey:
        np.lib.format.read_magic(grey)
        np.lib.format.read_array_header_1_0(grey)
        while part := grey.read(2**20):
            file.write(np.repeat(np.frombuffer(part, np.uint8), 3).data)
    os.replace(coloured, path)
    return file


def _evict(sets: Path, kept: Collection[Path], disk_cache_bytes: int) -> None:
    """Delete folders that a killed process left incomplete, then the least recently used ones beyond the limit."""
    used: list[tuple[float, int, Path]] = []
    for folder in sets.iterdir():
        try:
            touched = folder.stat().st_mtime
            n_bytes = sum(file.stat().st_size for file in folder.iterdir())
        except FileNotFoundError:
            continue  # another process deleted it
        if not folder.name.startswith(DECODING):
            used.append((touched, n_bytes, folder))
        elif touched < time.time() - ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)  # another process may be deleting it too
    total = sum(n_bytes for _, n_bytes, _ in used)
    for _, n_bytes, folder in sorted(used):
        if total <= disk_cache_bytes:
            break
        if folder not in kept and not _is_held(folder):
            shutil.rmtree(folder, ignore_errors=True)
            total -= n_bytes


@contextmanager
def held(folders: Iterable[Path]) -> Iterator[None]:
    """Keep other processes from deleting arrays of `decode_all`, which workers open when they need them."""
    with ExitStack() as stack:
        for folder in folders:
            fcntl.flock(stack.enter_context(open(folder / "images.npy", "rb")), fcntl.LOCK_SH)
        yield


def _is_held(folder: Path) -> bool:
    try:
        with open(folder / "images.npy", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # it is gone, or its file system has no such locks
        return False
    return False


def _touch(folder: Path) -> None:
    with suppress(PermissionError):  # another user's, which can be read
        os.utime(folder)
