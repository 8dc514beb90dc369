"""Images are decoded to what a viewer shows, and broken ones are told."""

import io
import struct
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tuning import images
from tuning.decoding import decode
from tuning.images import parallel_map

GREY = np.add.outer(np.arange(40) * 4, np.arange(60)).astype(np.uint8)  # [40, 60], brighter to the right and below
COLOURED = np.dstack([GREY, GREY[::-1], GREY[:, ::-1]])
ROUGH = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
ORIENTATION = 0x0112


def save(file: Path, image: Image.Image | np.ndarray, **options) -> str:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, **options)
    return str(file)


def shown(file: str, image_size: int) -> np.ndarray:
    return decode(file, image_size)[0]


def encoded(image: np.ndarray, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_grey_and_coloured_images_are_squashed_to_a_square(tmp_path, suffix):
    grey = shown(save(tmp_path / f"grey.{suffix}", GREY), 32)
    coloured = shown(save(tmp_path / f"coloured.{suffix}", COLOURED), 32)
    assert grey.shape == (32, 32) and coloured.shape == (32, 32, 3)
    assert grey.dtype == coloured.dtype == np.uint8
    wanted = np.asarray(Image.fromarray(GREY).resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    assert abs(grey - wanted).max() <= (0 if suffix == "png" else 8)
    assert (np.diff(grey[:, 8:-8].astype(int), axis=1) >= 0).mean() > 0.9


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_of_equal_channels_is_grey(tmp_path, suffix):
    three = shown(save(tmp_path / f"three.{suffix}", np.dstack([GREY] * 3)), 32)
    assert three.shape == (32, 32)
    assert abs(three.astype(int) - shown(save(tmp_path / f"one.{suffix}", GREY), 32)).max() <= 2


def test_bilevel_images_become_black_and_white(tmp_path):
    pixels = shown(save(tmp_path / "1.png", Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE)), 40)
    assert pixels.shape == (40, 40) and pixels.min() == 0 and pixels.max() == 255


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_laid_over_black(tmp_path, mode):
    image = Image.new("RGBA", (40, 40), (200, 200, 200, 255)).convert(mode)
    image.paste(Image.new("RGBA", (20, 40), (200, 200, 200, 0)).convert(mode), (0, 0))
    pixels = shown(save(tmp_path / "alpha.png", image), 40)
    assert pixels.shape == (40, 40)
    assert (pixels[:, :15] == 0).all() and (pixels[:, 25:] == 200).all()


def test_a_transparent_colour_is_black_and_an_opaque_image_is_untouched(tmp_path):
    keyed = Image.fromarray(np.where(GREY > 100, 200, 50).astype(np.uint8)).resize((40, 40), Image.Resampling.NEAREST)
    pixels = shown(save(tmp_path / "keyed.png", keyed, transparency=200), 40)
    assert set(np.unique(pixels)) == {0, 50}
    opaque = Image.fromarray(COLOURED).convert("RGBA")
    assert (shown(save(tmp_path / "a.png", opaque), 32) == shown(save(tmp_path / "b.png", COLOURED), 32)).all()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    plain = shown(save(tmp_path / f"plain.{suffix}", GREY), 32)
    turned = shown(save(tmp_path / f"turned.{suffix}", np.rot90(GREY), exif=exif(6)), 32)
    assert abs(plain.astype(int) - turned).max() <= (1 if suffix == "png" else 12)
    assert abs(plain.astype(int) - shown(save(tmp_path / f"no.{suffix}", np.rot90(GREY)), 32)).max() > 50


def test_a_large_jpeg_is_decoded_at_reduced_size_to_nearly_the_same(tmp_path):
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (60, 90), dtype=np.uint8)).resize((900, 600), Image.Resampling.BICUBIC)
    file = save(tmp_path / "large.jpg", rough, quality=92)
    with Image.open(file) as image:
        whole = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    difference = abs(shown(file, 64) - whole)
    assert difference.mean() < 2 and difference.max() < 25


def test_multi_picture_jpegs_give_their_first_picture(tmp_path):
    file = save(tmp_path / "phone.jpg", GREY, format="MPO", save_all=True, append_images=[Image.new("L", (60, 40))])
    assert shown(file, 32).mean() > 50


@pytest.mark.parametrize(
    ("mode", "suffix", "words"),
    [
        ("P", "png", "a PNG of mode P"),
        ("CMYK", "jpg", "a JPEG of mode CMYK"),
        ("I;16", "png", "16-bit PNG"),
        ("L", "gif", "a GIF file"),
        ("L", "bmp", "a BMP file"),
        ("L", "tif", "a TIFF file"),
        ("L", "webp", "a WebP file"),
    ],
)
def test_unsupported_kinds_are_named_with_the_cure(tmp_path, mode, suffix, words):
    image = Image.fromarray(GREY.astype(np.uint16)) if mode == "I;16" else Image.fromarray(GREY).convert(mode)
    file = save(tmp_path / f"image.{suffix}", image)
    with pytest.raises(ValueError, match=f"{words}.* isn't supported here yet; convert it to 8-bit"):
        shown(file, 32)


def test_dicom_and_16_bit_colour_are_named(tmp_path):
    (tmp_path / "film.png").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 100)
    with pytest.raises(ValueError, match="is a DICOM file"):
        shown(str(tmp_path / "film.png"), 32)
    lines = b"".join(b"\0" + bytes(6 * 8) for _ in range(8))
    parts = (b"IHDR" + struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(lines), b"IEND")
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(ValueError, match="is a 16-bit PNG of mode RGB"):
        shown(str(tmp_path / "deep.png"), 32)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello", "neither a JPEG nor a PNG"),
        (encoded(ROUGH, "JPEG")[:600], "can't be decoded"),
        (encoded(ROUGH, "PNG")[:-200], "can't be decoded"),
        (encoded(ROUGH, "PNG")[:20], "can't be decoded"),
        (png_header(20_000, 9_000), "20000 x 9000 pixels, over the limit of 178,000,000"),
    ],
)
def test_broken_files_raise_value_errors(tmp_path, content, words):
    (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        shown(str(tmp_path / "broken.jpg"), 32)
    with pytest.raises(ValueError, match="No such file"):
        shown(str(tmp_path / "gone.jpg"), 32)


def test_large_images_below_the_limit_do_not_warn(tmp_path):
    # Pillow warns from 89 million pixels on; this one lacks its pixels, which is what must be told.
    (tmp_path / "large.png").write_bytes(png_header(12_000, 12_000))
    with pytest.raises(ValueError, match="can't be decoded"):
        shown(str(tmp_path / "large.png"), 32)


def test_a_warning_of_pillow_is_an_error_and_changes_nothing_outside(tmp_path):
    broken = exif(6).tobytes()[:-6]
    file = save(tmp_path / "exif.jpg", GREY, exif=broken)
    before = list(warnings.filters)
    with pytest.raises(ValueError, match="can't be decoded"):
        shown(file, 32)
    reasons = list(parallel_map(partial(images._decode_or_reason, image_size=32), [file] * 50))
    assert all("EXIF" in reason for reason in reasons)
    assert warnings.filters == before


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG"]),
    changes=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.none() | st.integers(0, 500),
)
def test_damaged_files_give_pixels_or_a_value_error(tmp_path_factory, kind, changes, cut):
    content = bytearray(encoded(ROUGH, kind, exif=exif(6)))
    for offset, value in changes:
        content[offset] = value
    file = tmp_path_factory.getbasetemp() / "damaged"
    file.write_bytes(content[:cut])
    try:
        pixels = shown(str(file), 16)
    except ValueError as error:
        assert str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.shape[:2] == (16, 16)
