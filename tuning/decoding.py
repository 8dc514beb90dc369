"""Decode one image to the pixels that are trained on, with the facts of what was stored."""

import hashlib
import os
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from struct import error as StructError
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

DECODER_VERSION = 2  # raised with any change of the decoded pixels or facts: no older array is taken for a new one
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

Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

# `warnings.catch_warnings` changes the whole process: threads that enter and leave it in turn would leave Pillow's
# warnings as errors for ever. Only headers are read under the lock (about a tenth of the time), pixels are not.
_WARNINGS_LOCK = threading.Lock()


class Facts(NamedTuple):
    """What an image was before it was decoded."""

    width: int  # pixels as stored, before EXIF orientation
    height: int
    mode: str  # Pillow's name of the stored pixels' kind: L, RGB, RGBA, P, CMYK, I;16, ...
    format: str  # JPEG, PNG, ...
    bytes: int  # of the file
    told: str | None  # what a user should know, notes joined by "; "
    pixels_sha256: str  # of the decoded pixels and their shape, in hex


def decode(file: str, image_size: int) -> tuple[Pixels, Facts]:
    """An image as it is to be looked at, squashed to a square.

    EXIF orientation is applied, transparency is laid over black, and a coloured image whose channels are all equal
    is a grey one.

    Args:
        file: JPEG or PNG of 8 bits a channel.
        image_size: side, in pixels.

    Returns:
        uint8, [side, side] if grey, else [side, side, 3]; and the image's facts.

    Raises:
        ValueError: the file can't be read or is of a kind that isn't supported; the message doesn't name the file.
    """
    try:
        with open(file, "rb") as stream:
            image = _open(stream)
            stored = (*image.size, image.mode, str(image.format), os.fstat(stream.fileno()).st_size)
            # JPEGs decode at 1/2, 1/4 or 1/8 size; at least twice the target is kept. A film of 2048 x 2048 for 128 px
            # took 16 ms instead of 43, for a mean difference of 0.3 of 255, as between LANCZOS and bicubic.
            image.draft(None, (2 * image_size, 2 * image_size))  # None keeps the mode
            image.load()
        pixels = _square(image, image_size)
        return pixels, Facts(*stored, None, _hash_pixels(pixels))
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


def _hash_pixels(pixels: Pixels) -> str:
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(pixels.data)
    return digest.hexdigest()


@contextmanager
def _pillow_warnings_as_errors() -> Iterator[None]:
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"PIL\.")
        yield
