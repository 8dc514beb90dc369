"""Decode every image once, into one uint8 array per data set and size that is kept on disk by content."""

import errno
import hashlib
import json
import math
import os
import shutil
import threading
import time
import uuid
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from struct import error as StructError
from typing import Any, BinaryIO, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from tuning.config import InputError

DECODER_VERSION = 1  # raised with any change of the decoded pixels, so that no older array is taken for a new one
MAX_PIXELS = 178_000_000  # of one image; Pillow's own limit for what it calls a decompression bomb
MODES = ("1", "L", "LA", "RGB", "RGBA")
CURE = "convert it to 8-bit grey or RGB, as PNG or JPEG"
FOREIGN = {  # format: offset and bytes of its signature
    "GIF": (0, b"GIF8"),
    "BMP": (0, b"BM"),
    "TIFF": (0, b"II*\x00"),
    "big-endian TIFF": (0, b"MM\x00*"),
    "WebP": (8, b"WEBP"),
    "JPEG 2000": (4, b"jP  "),
    "HEIF or AVIF": (4, b"ftyp"),
    "PDF": (0, b"%PDF"),
    "gzip": (0, b"\x1f\x8b"),
    "DICOM": (128, b"DICM"),
}
# What Pillow was seen or is written to raise for broken files, besides ValueError.
DECODER_ERRORS = (OSError, SyntaxError, LookupError, TypeError, ArithmeticError, StructError, zlib.error, Warning)
DECODING = ".decoding-"  # prefix of a folder that is being written
ABANDONED_S = 3600.0  # a folder that is being written is touched every TOUCH_IMAGES, which takes seconds
TOUCH_IMAGES = 100
DISK_CURE = "free some or set FINETUNE_SEARCH_CACHE to a folder on a larger disk"

Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Item = TypeVar("Item")
Result = TypeVar("Result")

# `warnings.catch_warnings` changes the whole process: threads that enter and leave it in turn would leave Pillow's
# warnings as errors for ever. Only headers are read under the lock (about a tenth of the time), pixels are not.
_WARNINGS_LOCK = threading.Lock()


def cache_folder() -> Path:
    """Where decoded images outlive a run: $FINETUNE_SEARCH_CACHE, else ~/.cache/finetune-search."""
    return Path(os.environ.get("FINETUNE_SEARCH_CACHE") or "~/.cache/finetune-search").expanduser().resolve()


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Map over one thread per core, in order, at most four items a thread ahead of the one who asks.

    Pillow and hashlib let other threads run while they work.
    """
    threads = os.cpu_count() or 1
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# --- One image -------------------------------------------------------------------------------------------------------


def decode(file: str, image_size: int) -> Pixels:
    """An image as it is to be looked at, squashed to a square.

    EXIF orientation is applied, transparency is laid over black, and a coloured image whose channels are all equal
    is a grey one.

    Args:
        file: JPEG or PNG of 8 bits a channel.
        image_size: side, in pixels.

    Returns:
        uint8, [side, side] if grey, else [side, side, 3].

    Raises:
        ValueError: the file can't be read or is of a kind that isn't supported; the message doesn't name the file.
    """
    try:
        with open(file, "rb") as stream:
            image = _open(stream)
            # JPEGs decode at 1/2, 1/4 or 1/8 size; at least twice the target is kept. A film of 2048 x 2048 for 128 px
            # took 16 ms instead of 43, for a mean difference of 0.3 of 255, as between LANCZOS and bicubic.
            image.draft(None, (2 * image_size, 2 * image_size))  # None keeps the mode
            image.load()
        return _square(image, image_size)
    except ValueError:
        raise
    except DECODER_ERRORS as error:
        raise ValueError(f"can't be decoded ({error or type(error).__name__}); replace it or leave it out") from error


def _open(stream: BinaryIO) -> ImageFile:
    """An image whose header is read and found to be of a kind that `decode` takes."""
    start = stream.read(132)
    stream.seek(0)
    if not start:
        raise ValueError("is empty (0 bytes); replace it or leave it out")
    for kind, (offset, signature) in FOREIGN.items():
        if start[offset : offset + len(signature)] == signature:
            raise ValueError(f"is a {kind} file, which isn't supported here yet; {CURE}")
    # The two classes are called directly, since `Image.open` warns of large and of multi-picture images.
    reader = {b"\xff\xd8\xff": JpegImageFile, b"\x89PN": PngImageFile}.get(start[:3])
    if reader is None:
        raise ValueError("is neither a JPEG nor a PNG image; replace it or leave it out")
    with _pillow_warnings_as_errors():
        image = reader(stream)
    # Pillow drops the lower byte of 16-bit LA and RGB without a word; the raw mode still tells.
    depth = "16-bit " if any("16" in str(tile[3]) for tile in image.tile) else ""
    if depth or image.mode not in MODES:
        raise ValueError(f"is a {depth}{image.format} of mode {image.mode}, which isn't supported here yet; {CURE}")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"has {image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}; make it smaller"
        )
    return image


def _square(image: Image.Image, image_size: int) -> Pixels:
    if image.has_transparency_data:
        image = image.convert("RGBA").convert("RGBa")  # colours times alpha: the image over black
    elif image.mode == "1":
        image = image.convert("L")
    image = image.resize((image_size, image_size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    with _pillow_warnings_as_errors():
        ImageOps.exif_transpose(image, in_place=True)
    pixels: Pixels = np.array(image)
    if pixels.ndim == 3:
        pixels = pixels[:, :, :3]
        if (pixels == pixels[:, :, :1]).all():
            pixels = pixels[:, :, 0]
    return np.ascontiguousarray(pixels)


@contextmanager
def _pillow_warnings_as_errors() -> Iterator[None]:
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"PIL\.")
        yield


# --- A data set ------------------------------------------------------------------------------------------------------


def content_hashes(files: Sequence[str], folder: Path) -> list[str]:
    """sha256 of each file's bytes; a file of unchanged size and time is not read again.

    Args:
        files: paths.
        folder: holds `hashes.parquet`, what is known from before; made where it is missing.

    Returns:
        One hash a file, in hex.

    Raises:
        InputError: files that can't be read, or a broken `hashes.parquet`.
    """
    table = folder / "hashes.parquet"
    try:
        known = {
            (row["file"], row["size"], row["mtime_ns"]): row["sha256"]
            for row in (pq.read_table(table).to_pylist() if table.is_file() else [])
        }
    except (OSError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{table}: can't be read ({error}); delete it, it is made anew") from error

    try:
        keys = [(os.path.abspath(file), (status := os.stat(file)).st_size, status.st_mtime_ns) for file in files]
        new = [key for key in dict.fromkeys(keys) if key not in known]
        found = dict(zip(new, parallel_map(_hash_file, [file for file, _, _ in new]), strict=True))
    except OSError as error:
        raise InputError(f"{error.filename}: can't be read ({error.strerror}); make it readable") from error
    known |= found
    if found:
        # A changed file replaces its older row.
        rows = {key[0]: (*key, digest) for key, digest in known.items()}
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".hashes-{uuid.uuid4().hex}.parquet"
        names = ["file", "size", "mtime_ns", "sha256"]
        columns = [list(column) for column in zip(*rows.values(), strict=True)]
        pq.write_table(pa.table(columns, names=names), temporary)
        os.replace(temporary, table)
    return [known[key] for key in keys]


def _hash_file(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def decode_all(
    files: Sequence[str],
    hashes: Sequence[str],
    image_size: int,
    *,
    folder: Path,
    disk_cache_bytes: int,
    keep: Collection[Path] = (),
    map: Callable[[Callable[[str], Pixels | str], Sequence[str]], Iterable[Pixels | str]] = map,
) -> tuple[Path, dict[int, str]]:
    """Decode images once into `images.npy`, a uint8 array [n, side, side, channels], channels being 1 if all are grey.

    Images are written as they come, so memory stays bounded; the folder appears whole or not at all.

    Args:
        files: paths of JPEG and PNG images.
        hashes: content hash of each file.
        image_size: side, in pixels.
        folder: the cache; arrays lie in its `images/<key>/`.
        disk_cache_bytes: least recently used arrays beyond this go, but never the one returned.
        keep: folders that never go either.
        map: calls a function on each item, in order; `parallel_map`, or one that fans out over a cluster.

    Returns:
        The array's folder and the reason for each index that can't be decoded. If there are any, nothing is kept.

    Raises:
        InputError: the array doesn't fit on the disk.
    """
    sets = folder / "images"
    key = hashlib.sha256(json.dumps([DECODER_VERSION, image_size, list(hashes)]).encode()).hexdigest()
    target = sets / key
    if (target / "images.npy").is_file():
        os.utime(target)
        return target, {}

    sets.mkdir(parents=True, exist_ok=True)
    unfinished = sets / f"{DECODING}{uuid.uuid4().hex}"
    unfinished.mkdir()
    unreadable: dict[int, str] = {}
    try:
        decoded = map(partial(_decode_or_reason, image_size=image_size), files)
        _write_array(unfinished / "images.npy", (len(files), image_size, image_size), decoded, unreadable)
        if not unreadable:
            _rename_folder(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already if it was renamed
    if not unreadable:
        os.utime(target)
        _evict(sets, {target, *keep}, disk_cache_bytes)
    return target, unreadable


def open_images(folder: Path) -> Pixels:
    """The array of `decode_all`, memory-mapped and read-only: uint8 [n, side, side, channels]."""
    images: Pixels = np.load(folder / "images.npy", mmap_mode="r")
    return images


def _decode_or_reason(file: str, image_size: int) -> Pixels | str:
    try:
        return decode(file, image_size)
    except ValueError as error:
        return str(error)


def _write_array(
    path: Path, shape: tuple[int, int, int], decoded: Iterable[Pixels | str], unreadable: dict[int, str]
) -> None:
    """Write images as they come, with three channels from the first coloured one on; those before it are rewritten.

    Written as a file, not through a memory map: that took longer, and a full disk would end the process with SIGBUS.
    """
    channels = 1
    file = _begin_array(path, (*shape, channels))
    try:
        for index, pixels in enumerate(decoded):
            if index % TOUCH_IMAGES == 0:
                os.utime(path.parent)
            if isinstance(pixels, str):
                unreadable[index] = pixels
                continue
            if pixels.ndim == 3 and channels == 1:
                file.close()
                channels = 3
                file = _with_three_channels(path, shape)
            whole = pixels if pixels.ndim == 3 or channels == 1 else np.repeat(pixels, 3)
            file.write(whole.data)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        raise InputError(f"{path}: can't be written ({error.strerror}); {DISK_CURE}") from error
    finally:
        file.close()


def _begin_array(path: Path, shape: tuple[int, int, int, int]) -> BinaryIO:
    """A new NumPy file with its header, to which pixels are written in order."""
    free_bytes = shutil.disk_usage(path.parent).free
    if math.prod(shape) > free_bytes:
        needed = f"the decoded images take {math.prod(shape):,} bytes, {free_bytes:,} are free"
        raise InputError(f"{path.parent.parent}: {needed}; {DISK_CURE}")
    file = open(path, "wb")
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file


def _with_three_channels(path: Path, shape: tuple[int, int, int]) -> BinaryIO:
    """Take a grey array's place by the same images in three channels; gives the file to go on with."""
    coloured = path.with_name("coloured.npy")
    file = _begin_array(coloured, (*shape, 3))
    with open(path, "rb") as grey:
        np.lib.format.read_magic(grey)
        np.lib.format.read_array_header_1_0(grey)
        while part := grey.read(2**20):
            file.write(np.repeat(np.frombuffer(part, np.uint8), 3).data)
    os.replace(coloured, path)
    return file


def _rename_folder(unfinished: Path, target: Path) -> None:
    try:
        os.rename(unfinished, target)
    except OSError:
        # Another process decoded the same set meanwhile: its array is as good.
        if not (target / "images.npy").is_file():
            raise


def _evict(sets: Path, kept: Collection[Path], disk_cache_bytes: int) -> None:
    """Delete folders that a killed process left half written, then the least recently used beyond the limit."""
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
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
            total -= n_bytes
