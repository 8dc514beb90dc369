"""Decode one image to what a viewer shows, at the size for training, with facts of the stored image."""

import hashlib
import os
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from struct import error as StructError
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from tuning.data import dicom
from tuning.record.storage import is_uri, readable
from tuning.settings.config import FORMATS, InputError
from tuning.settings.words import count

DECODER_VERSION = 5  # raised with any change of pixels or facts (not of the notes' words): no older array is used
FEW_LEVELS = 16  # of a grey picture, for a note
MAX_PIXELS = 178_000_000  # of one image; Pillow's own limit for what it calls a decompression bomb
# Channels that differ by at most this many levels are grey, apart from JPEG's rounding of chroma. Of 120 chest X-rays
# stored in colour, at 64, 128 and 224 px, 86 have equal channels and 29 differ by 1 to 11 levels; the 5 that have
# coloured marks or a tint differ by 25 or more.
GREY_LEVELS = 12
LEAST_ASPECT, MIN_ASPECT = 0.01, 0.1  # of pixels: nearer to 1 they count as square, further from it as nonsense
DARK = 64  # of 255: what 14 of 16 bits come to
MOST_PIXELS = 0.99  # share of the pixels without marks and borders, whose edges are blurred
NEARLY_BLACK = 16  # of 255: what 12 of 16 bits come to
SIGNATURES = [  # format, and the offset and bytes that identify it
    ("DICOM", 128, b"DICM"),  # first, since another format's signature may precede it
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("PNG", 0, b"\x89PNG"),
    ("GIF", 0, b"GIF8"),
    ("BMP", 0, b"BM"),
    *[("TIFF", 0, start) for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")],
    ("WEBP", 8, b"WEBP"),
    ("JPEG 2000", 4, b"jP  "),  # from here on not supported
    ("HEIF or AVIF", 4, b"ftyp"),
    ("PDF", 0, b"%PDF"),
    ("gzip", 0, b"\x1f\x8b"),
    *[("DICOM", 0, start) for start in (b"\2\0\0\0UL", b"\2\0\1\0OB")],  # with a header, without a preamble
    # Without preamble and header DICOM begins with an element of group 8: length, character set, type, time, class, id.
    *[("DICOM", 0, bytes((8, 0, element, 0))) for element in (0x00, 0x05, 0x08, 0x12, 0x16, 0x18)],
]
# The classes are called directly, since `Image.open` warns about large and multi-picture images.
READERS: dict[str, Callable[[BinaryIO], ImageFile]] = {"JPEG": JpegImageFile, "PNG": PngImageFile, "GIF": GifImageFile}
READERS |= {"BMP": BmpImageFile, "TIFF": TiffImageFile, "WEBP": WebPImageFile}
TURNS = {  # what turns an image of an EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 274, 258, 262, 0  # tags, and a value of the last
PLANES, SEPARATE = 284, 2  # a tag, and a value of it
# What the libraries raise for broken files, as seen or by their source.
BUILTIN_ERRORS = (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
DECODER_ERRORS = (*BUILTIN_ERRORS, SyntaxError, AssertionError, StructError, zlib.error, Image.DecompressionBombError)

Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

_LOCK = threading.Lock()  # guards the two below
_inside = 0  # number of threads that are decoding
_quiet = ExitStack()


class Facts(NamedTuple):
    """The stored image, before it was decoded."""

    width: int  # pixels as stored, before EXIF orientation
    height: int
    mode: str  # Pillow's mode of the stored pixels: L, RGB, RGBA, P, CMYK, I;16, ...
    format: str  # JPEG, PNG, ...
    bytes: int  # of the file
    notes: str | None  # what a user should know, joined by "; "
    pixels_sha256: str  # of the decoded pixels and their shape, in hex


class Shown(NamedTuple):
    """An image as a viewer shows it, at any size, with facts of the stored one."""

    image: Image.Image  # of mode L or RGB, upright
    width: int
    height: int
    mode: str
    notes: list[str]
    aspect: float = 1.0  # height of a pixel for a width of 1


def decode(file: str, image_size: int, *, fit: str = "squash", drop_colour: bool = False) -> tuple[Pixels, Facts]:
    """Return an image as a viewer shows it, made square, uint8 [side, side] or [side, side, 3], and its facts.

    EXIF orientation is applied and transparency becomes black. A coloured image whose channels are equal, apart from
    rounding, becomes grey. Colour profiles are not applied.

    Args:
        file: JPEG, PNG, TIFF, WebP, BMP, GIF or DICOM, whatever its suffix; a path or a URI.
        image_size: side, in pixels.
        fit: `squash` to a square, `crop` to the centre square, or `letterbox` with black bars.
        drop_colour: makes every image grey.

    Raises:
        InputError: the file can't be read or its format isn't supported; the message doesn't name the file.
        OSError: the storage fails, which is no fault of the image.
    """
    content = readable(file) if is_uri(file) else None
    try:
        with content or open(file, "rb") as stream, _quietly():
            kind = _kind(stream)
            shown = _show_dicom(stream) if kind == "DICOM" else _show(stream, kind, image_size, drop_colour)
            n_bytes = stream.seek(0, os.SEEK_END)
            image = _in_mode("L", shown.image) if drop_colour else shown.image
            pixels = _pixels(_square(image, image_size, fit, shown.aspect))
            empty = [] if pixels.ndim == 3 else _emptiness(image, shown)
    except InputError:
        raise
    except DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"can't be decoded ({reason}); replace it or leave it out") from error
    suffix = os.path.splitext(file)[1].lower()
    misnamed = [f"is a {kind} file named {suffix}"] if FORMATS.get(suffix, kind) != kind else []
    notes = "; ".join(misnamed + shown.notes + empty) or None
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(pixels.data)
    return pixels, Facts(shown.width, shown.height, shown.mode, kind, n_bytes, notes, digest.hexdigest())


def is_image(file: str) -> bool:
    """Return whether a file on this machine begins as an image of a format that can be read, whatever its suffix."""
    if os.path.basename(file).upper() == "DICOMDIR":  # an index, which begins as a DICOM image
        return False
    try:
        with open(file, "rb") as stream:
            return bool(_kind(stream))
    except (InputError, OSError):
        return False


def _kind(stream: BinaryIO) -> str:
    """The format, by the first bytes."""
    start = stream.read(132)
    stream.seek(0)
    if not start:
        raise InputError("is empty (0 bytes); replace it or leave it out")
    for kind, offset, signature in SIGNATURES:
        if start[offset : offset + len(signature)] == signature:
            if kind not in (*READERS, "DICOM"):
                raise InputError(f"is a {kind} file, which isn't supported; convert it to PNG or JPEG")
            return kind
    raise InputError(f"is not an image ({', '.join(READERS)} or DICOM); replace it or leave it out")


def _show(stream: BinaryIO, kind: str, image_size: int, drop_colour: bool) -> Shown:
    image = READERS[kind](stream)
    width, height = (image.tag_v2[256], image.tag_v2[257]) if isinstance(image, TiffImageFile) else image.size
    _check_size(width, height)
    mode = image.mode
    if mode in ("I", "F", "LAB"):
        cure = "convert it to 8 or 16 bits per pixel"
        raise InputError(f"is a {kind} of mode {mode}, whose values have no fixed black and white; {cure}")
    if (
        isinstance(image, TiffImageFile)
        and image.tag_v2.get(PLANES) == SEPARATE
        and 16 in image.tag_v2[BITS_PER_SAMPLE]
    ):
        cure = "convert it to PNG"
        raise InputError(f"is a TIFF of 16-bit colours in separate planes, which Pillow reads wrongly; {cure}")
    notes = []
    if getattr(image, "is_animated", False):
        notes.append(dicom.FRAMES)
    # JPEGs decode at 1/2, 1/4 or 1/8 size; at least twice the target is kept. A film of 2048 x 2048 for 128 px
    # took 16 ms instead of 43, for a mean difference of 0.3 of 255, as between LANCZOS and bicubic.
    grey = drop_colour and mode == "RGB"
    image.draft("L" if grey else None, (2 * image_size, 2 * image_size))  # None keeps the mode
    image.load()
    upright = image if kind == "TIFF" else _turn(image, notes)  # a TIFF is turned already
    return Shown(_viewable(upright, notes), width, height, mode, notes)


def _show_dicom(stream: BinaryIO) -> Shown:
    dataset = dicom.read(stream)
    _check_size(dataset.Columns, dataset.Rows)
    image, notes = dicom.show(dataset)
    return Shown(image, dataset.Columns, dataset.Rows, dicom.mode(dataset), notes, dicom.aspect(dataset))


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise InputError("has no pixels; replace it or leave it out")
    if width * height > MAX_PIXELS:
        raise InputError(f"has {width} x {height} pixels, over the limit of {MAX_PIXELS:,}; make it smaller")


def _turn(image: ImageFile, notes: list[str]) -> Image.Image:
    """Turn an image upright; a broken EXIF block is a note, since the pixels may be good."""
    try:
        exif = image.getexif()
        turn = TURNS.get(exif.get(ORIENTATION, 1))
        broken = bool(image.info.get("exif")) and not exif
    except DECODER_ERRORS:
        turn, broken = None, True
    if broken:
        notes.append("has a broken EXIF block, so its orientation may be wrong")
    return image if turn is None else image.transpose(turn)


def _viewable(image: Image.Image, notes: list[str]) -> Image.Image:
    """Convert an image to mode L or RGB, with black for what is transparent."""
    if image.mode.startswith("I;16"):
        image = _eight_bits(image, notes)
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        over = Image.new("RGB", image.size)
        over.paste(image, mask=image)
        return over
    return _in_mode("L" if image.mode in ("1", "L") else "RGB", image)


def _in_mode(mode: str, image: Image.Image) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which copies in any case


def _eight_bits(image: Image.Image, notes: list[str]) -> Image.Image:
    """Keep the upper bits, as viewers do, and Pillow with 16-bit colours."""
    values = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    grey = (values >> (tags.get(BITS_PER_SAMPLE, (16,))[0] - 8)).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 0
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts 8 bits, not 16
        grey = 255 - grey
    if grey.max() < NEARLY_BLACK:
        notes.append("is nearly black: its 16-bit values use less than 1/16 of their range")
        return Image.fromarray(grey)
    picture = Image.fromarray(grey)
    counts = np.array(picture.histogram())
    counts[grey.max()] = 0  # marks and borders on a film of 12 or 14 bits
    most = MOST_PIXELS * counts.sum()
    if counts[:NEARLY_BLACK].sum() >= most:
        notes.append("is nearly black but for marks or a border: the other 16-bit values use 1/16 of their range")
    elif counts[:DARK].sum() >= most:
        notes.append("is dark: its 16-bit values, apart from marks or a border, use less than 1/4 of their range")
    return picture


def _emptiness(image: Image.Image, shown: Shown) -> list[str]:
    """Notes of a grey picture on which little can be seen, whatever made it so."""
    if shown.mode == "1" or any("nearly black" in note for note in shown.notes):
        return []
    counts = np.array((image if image.mode == "L" else image.getchannel("G")).histogram())
    used = np.flatnonzero(counts)
    if used[0] > 255 - NEARLY_BLACK:
        return ["is nearly white"]
    if used[-1] < NEARLY_BLACK:
        return ["is nearly black"]
    if len(used) < FEW_LEVELS:
        return [f"has only {count(len(used), 'grey level')}"]
    between = np.sort(counts[used[1:-1]])[::-1].cumsum()  # without collimation, padding, marks and borders
    levels = 1 + int(np.searchsorted(between, MOST_PIXELS * between[-1]))
    return (
        [f"has only {count(levels, 'grey level')} between its darkest and its brightest"] if levels < FEW_LEVELS else []
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress warnings of Pillow and pydicom, which are about odd but readable files.

    `warnings.catch_warnings` changes the whole process, and threads that enter and leave it in turn would leave it
    changed for good: so the first thread in enters it, and the last one out leaves it.
    """
    global _inside
    with _LOCK:
        if not _inside:
            _quiet.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"(PIL|pydicom)\.")
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                _quiet.close()


def _square(image: Image.Image, image_size: int, fit: str, aspect: float) -> Image.Image:
    if fit != "squash" and abs(aspect - 1) > LEAST_ASPECT and MIN_ASPECT < aspect < 1 / MIN_ASPECT:
        image = image.resize((image.width, max(round(image.height * aspect), 1)), Image.Resampling.LANCZOS)
    width, height = image.size
    target = (image_size, image_size)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    elif fit == "letterbox":
        longer = max(width, height)
        target = (max(round(width * image_size / longer), 1), max(round(height * image_size / longer), 1))
    image = image.resize(target, Image.Resampling.LANCZOS, reducing_gap=3.0)
    if image.size == (image_size, image_size):
        return image
    square = Image.new(image.mode, (image_size, image_size))
    square.paste(image, ((image_size - image.width) // 2, (image_size - image.height) // 2))
    return square


def _pixels(image: Image.Image) -> Pixels:
    """[side, side] if the image is grey, else [side, side, 3]."""
    if image.mode == "RGB":
        red, green, blue = (np.asarray(channel) for channel in image.split())
        most, least = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
        if (most - least).max() <= GREY_LEVELS:
            image = image.convert("L")
    return np.array(image)
