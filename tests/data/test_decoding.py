"""Images are decoded to what a viewer shows, and broken ones are reported."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shared import examples

from tuning.data.decoding import decode
from tuning.data.images import parallel_map
from tuning.settings.config import InputError

GREY = np.add.outer(np.arange(40) * 4, np.arange(60)).astype(np.uint8)  # [40, 60], brighter to the right and below
COLOURED = np.dstack([GREY, GREY[::-1], GREY[:, ::-1]])
ROUGH = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
ORIENTATION = 0x0112
KINDS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]


def save(file: Path, image: Image.Image | np.ndarray, **options) -> str:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, **options)
    return str(file)


def shown(file: str, image_size: int, **options) -> np.ndarray:
    return decode(file, image_size, **options)[0]


def notes(file: str, image_size: int = 32) -> str | None:
    return decode(file, image_size)[1].notes


def squash(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)).astype(int)


def encoded(image: np.ndarray, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def png(width: int, height: int, lines: bytes = b"", *, bits: int = 8, colours: int = 0) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    parts = (header, b"IDAT" + zlib.compress(lines), b"IEND")
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(width: int, height: int, pixels: bytes, *, bits: tuple[int, ...], photometric: int) -> bytes:
    """A little-endian, uncompressed TIFF of one strip."""
    depth = (3, len(bits), bits[0] if len(bits) == 1 else 8)  # where the depths of several channels stand
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: depth, 259: (3, 1, 1), 262: (3, 1, photometric)}
    tags |= {273: (4, 1, 200), 277: (3, 1, len(bits)), 278: (4, 1, height), 279: (4, 1, len(pixels))}
    depths = struct.pack("<4H", *bits, *[0] * (4 - len(bits)))
    entries = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in tags.items())
    head = b"II*\0" + struct.pack("<I", 16) + depths + struct.pack("<H", len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + pixels


def write(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    return str(file)


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    """By where EXIF 2.3 (4.6.4) says that the first row and column stand; Pillow errs on TIFFs opened by name."""
    upright = GREY.T if orientation >= 5 else GREY
    upright = upright[::-1] if orientation in (3, 4, 7, 8) else upright
    upright = upright[:, ::-1] if orientation in (2, 3, 6, 7) else upright
    pixels, facts = decode(save(tmp_path / f"turned.{suffix}", GREY, exif=exif(orientation)), 32)
    assert abs(pixels - squash(upright, 32)).max() <= (12 if suffix in ("jpg", "webp") else 1)
    assert (facts.width, facts.height, facts.notes) == (60, 40, None)


def over_black(image: Image.Image) -> np.ndarray:
    """RGB of what is seen, by arithmetic on each pixel."""
    channels = np.asarray(image.convert("RGBA")).astype(float)
    return np.rint(channels[..., :3] * channels[..., 3:] / 255).astype(np.uint8)


def seen(mode: str) -> Image.Image:
    """A picture in a mode: in colour where the mode has colours, and half transparent where it has transparency."""
    image = Image.fromarray(COLOURED)
    if mode in ("1", "L", "LA"):
        image = image.convert("L")
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(GREY[:, ::-1]))
    return image.convert(mode) if image.mode != mode else image


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        *[("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")],
        *[("PNG", mode, {"transparency": 5}) for mode in ("L", "P")],
        ("PNG", "P", {"transparency": bytes(range(256))}),
        *[("TIFF", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")],
        *[("TIFF", mode, {"compression": "tiff_lzw"}) for mode in ("L", "P", "RGB", "RGBA", "CMYK")],
        *[("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
        *[("GIF", mode, {}) for mode in ("1", "L", "P", "RGB")],
        ("GIF", "P", {"transparency": 5}),
        *[("WEBP", mode, {"lossless": True, "exact": True}) for mode in ("L", "RGB", "RGBA")],
    ],
)
def test_every_format_and_mode_is_seen_as_in_a_viewer(tmp_path, kind, mode, options):
    image = seen(mode)
    pixels, facts = decode(save(tmp_path / "image", image, format=kind, **options), 32)
    if kind == "BMP" and mode == "RGBA":
        image.putalpha(255)  # viewers leave a BMP's fourth byte out
    if "transparency" in options:
        image.info["transparency"] = options["transparency"]
    if kind == "GIF" and mode == "RGB":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
    wanted = squash(over_black(image), 32)
    assert abs(pixels.reshape(32, 32, -1) - wanted).max() <= 2
    assert (pixels.ndim == 2) == (mode in ("1", "L", "LA"))
    two = "has only 2 grey levels" if (kind, mode) == ("GIF", "1") else None  # a GIF doesn't say that it has 1 bit
    assert (facts.width, facts.height, facts.format, facts.notes) == (60, 40, kind, two)
    assert facts.bytes == (tmp_path / "image").stat().st_size
    with Image.open(tmp_path / "image") as stored:
        assert facts.mode == stored.mode


def test_cmyk_is_seen_as_ink(tmp_path):
    inks = np.dstack([*(np.full((40, 40), ink, np.uint8) for ink in (255, 100, 0)), np.repeat(GREY[:1, :40], 40, 0)])
    light = (255 - inks.astype(float)) / 255
    wanted = squash(np.rint(255 * light[..., :3] * light[..., 3:]).astype(np.uint8), 32)
    image = Image.fromarray(inks, "CMYK")
    # Adobe's JPEGs hold the inks inverted, which Pillow writes too.
    content = Path(save(tmp_path / "inks.jpg", image, quality=100, subsampling=0)).read_bytes()
    assert b"Adobe" in content
    pixels, facts = decode(str(tmp_path / "inks.jpg"), 32)
    assert facts.mode == "CMYK" and abs(pixels - wanted).max() <= 4
    assert abs(shown(save(tmp_path / "inks.tif", image), 32) - wanted).max() <= 1


RAMP = np.repeat(np.linspace(0, 65535, 64).round().astype(np.uint16)[None], 64, axis=0)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("png", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"}), ("tif", {"compression": "tiff_adobe_deflate"})],
)
def test_16_bit_greys_keep_their_upper_bits(tmp_path, suffix, options):
    pixels, facts = decode(save(tmp_path / f"ramp.{suffix}", RAMP, **options), 64)
    assert facts.mode == "I;16" and facts.notes is None
    assert abs(pixels - np.rint(RAMP / 257)).max() <= 1
    dark = save(tmp_path / f"dark.{suffix}", RAMP >> 4, **options)
    assert shown(dark, 64).max() == 15
    assert notes(dark) == "is nearly black: its 16-bit values use less than 1/16 of their range"
    Image.fromarray(RAMP // 5).save(dark, **options)  # of 14 bits
    assert notes(dark).startswith("is dark: ")
    for bits, note in ((12, "is nearly black but for marks or a border: "), (14, "is dark: ")):
        for rows in (2, 12):  # a letter on the film, a fifth of it
            marked = RAMP // 2 ** (16 - bits)
            marked[:rows] = 65535
            Image.fromarray(marked).save(dark, **options)
            assert notes(dark).startswith(note)


def test_16_bit_colours_and_inverted_and_12_bit_greys(tmp_path):
    wanted = np.rint(RAMP / 257)
    colours = np.dstack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 1000)])
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in colours)
    files = {
        "rgb.png": png(64, 64, lines, bits=16, colours=2),
        "rgb.tif": tiff(64, 64, colours.tobytes(), bits=(16, 16, 16), photometric=2),
    }
    for name, content in files.items():
        pixels = shown(write(tmp_path / name, content), 64)
        assert abs(pixels[..., 0] - wanted).max() <= 1 and abs(pixels[..., 1] - wanted[:, ::-1]).max() <= 1
        assert (pixels[..., 2] == 3).all()
    alpha = np.dstack([RAMP, np.full_like(RAMP, 32768)])
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in alpha)
    assert abs(shown(write(tmp_path / "la.png", png(64, 64, lines, bits=16, colours=4)), 64) - wanted / 2).max() <= 1.5

    inverted = tiff(64, 64, (65535 - RAMP).tobytes(), bits=(16,), photometric=0)
    assert abs(shown(write(tmp_path / "inverted.tif", inverted), 64) - wanted).max() <= 1
    twelve = RAMP.ravel().astype(int) >> 4
    packed = np.stack([twelve[::2] >> 4, (twelve[::2] & 15) << 4 | twelve[1::2] >> 8, twelve[1::2] & 255], axis=1)
    content = tiff(64, 64, packed.astype(np.uint8).tobytes(), bits=(12,), photometric=1)
    assert abs(shown(write(tmp_path / "twelve.tif", content), 64) - wanted).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_used_and_noted(tmp_path, kind):
    others = [Image.fromarray(GREY[::-1].copy()), Image.fromarray(GREY[:, ::-1].copy())]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = save(tmp_path / "frames", GREY, format=kind, save_all=True, append_images=others, **options)
    assert abs(shown(file, 32) - squash(GREY, 32)).max() <= 1
    assert notes(file) == "has several frames, only the first is used"


def test_a_wrong_suffix_is_noted_and_does_not_matter(tmp_path):
    file = save(tmp_path / "image.jpg", GREY, format="PNG")
    assert (shown(file, 32) == shown(save(tmp_path / "image.png", GREY), 32)).all()
    assert notes(file) == "is a PNG file named .jpg"
    assert notes(save(tmp_path / "image.JPEG", GREY, format="JPEG")) is None
    assert notes(save(tmp_path / "image.dat", GREY, format="PNG")) is None
    frames = save(tmp_path / "image.bmp", GREY, format="GIF", save_all=True, append_images=[Image.new("L", (60, 40))])
    assert notes(frames) == "is a GIF file named .bmp; has several frames, only the first is used"


def test_grey_but_for_rounding_is_grey_and_faint_colour_is_not(tmp_path):
    tinted = np.dstack([GREY // 2 + 40, GREY // 2 + 45, GREY // 2 + 50])
    pixels = shown(save(tmp_path / "tinted.png", tinted), 32)
    assert pixels.shape == (32, 32) and abs(pixels - squash(tinted[..., 1], 32)).max() <= 3
    marked = np.dstack([GREY // 2] * 3)
    marked[18:22, 28:32] = (110, 80, 80)
    assert shown(save(tmp_path / "marked.png", marked), 32).shape == (32, 32, 3)


# --- Shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("turned", [False, True])
def test_fits(tmp_path, suffix, turned):
    wide = np.repeat(np.repeat(np.arange(3, dtype=np.uint8) * 100 + 50, 200)[None], 200, axis=0)  # three squares
    options = {"exif": exif(6)} if turned else {}
    file = save(tmp_path / f"wide.{suffix}", np.rot90(wide) if turned else wide, **options)
    squashed, cropped, boxed = (shown(file, 30, fit=fit) for fit in ("squash", "crop", "letterbox"))
    assert {each.shape for each in (squashed, cropped, boxed)} == {(30, 30)}
    assert abs(cropped.astype(int) - 150).max() <= 6
    assert (boxed[:10] == 0).all() and (boxed[20:] == 0).all()
    for pixels in (squashed, boxed[10:20]):
        for third, level in enumerate((50, 150, 250)):
            assert abs(pixels[:, 10 * third + 3 : 10 * third + 7].astype(int) - level).max() <= 6


@examples(40)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    side=st.integers(1, 80),
    fit=st.sampled_from(["squash", "crop", "letterbox"]),
    kind=st.sampled_from(["JPEG", "PNG"]),
)
def test_an_even_image_stays_even_in_any_fit(tmp_path_factory, width, height, side, fit, kind):
    even = encoded(np.full((height, width), 200, np.uint8), kind)
    pixels = shown(write(tmp_path_factory.getbasetemp() / "even", even), side, fit=fit)
    assert pixels.shape == (side, side)
    if fit == "letterbox":
        down, across = (int((pixels > 0).any(axis).sum()) for axis in (1, 0))
        left, top = (side - across) // 2, (side - down) // 2
        pixels = pixels[top : top + down, left : left + across]
        for found, length in ((down, height), (across, width)):  # a JPEG decoded at a half may be a pixel off
            assert abs(found - max(round(length * side / max(width, height)), 1)) <= (kind == "JPEG")
    assert abs(pixels.astype(int) - 200).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_without_colour_every_image_is_grey(tmp_path, suffix):
    file = save(tmp_path / f"coloured.{suffix}", np.kron(COLOURED, np.ones((5, 5, 1), np.uint8)))
    pixels, facts = decode(file, 32, drop_colour=True)
    wanted = np.asarray(Image.fromarray(shown(file, 32)).convert("L")).astype(int)
    assert pixels.shape == (32, 32) and abs(pixels - wanted).max() <= 3
    assert facts.mode == "RGB" and (facts.width, facts.height) == (300, 200)
    transparent = Image.fromarray(COLOURED)
    transparent.putalpha(Image.fromarray(GREY))
    for image in (transparent, Image.fromarray(COLOURED).convert("P"), Image.fromarray(COLOURED).convert("CMYK")):
        file = save(tmp_path / "other", image, format="TIFF")
        assert shown(file, 32, drop_colour=True).shape == (32, 32)
    jpeg = save(tmp_path / "inks.jpg", Image.fromarray(COLOURED).convert("CMYK"))
    assert shown(jpeg, 32, drop_colour=True).shape == (32, 32)


# --- JPEG and broken files -------------------------------------------------------------------------------------------


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
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello", "is not an image \\(JPEG, PNG, GIF, BMP, TIFF, WEBP or DICOM\\)"),
        (b"%PDF-1.4", "is a PDF file, which isn't supported; convert it to PNG or JPEG"),
        (b"\0\0\0\x1cftypavif", "is a HEIF or AVIF file"),
        (encoded(ROUGH, "JPEG")[:600], "can't be decoded"),
        (encoded(ROUGH, "PNG")[:-200], "can't be decoded"),
        (encoded(ROUGH, "PNG")[:20], "can't be decoded"),
        *[(encoded(ROUGH, kind)[: len(encoded(ROUGH, kind)) // 2], "can't be decoded") for kind in KINDS],
        (tiff(4, 4, bytes(64), bits=(32,), photometric=1), "is a TIFF of mode I, whose values have no fixed black"),
    ],
)
def test_broken_files_raise_value_errors(tmp_path, content, words):
    (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        shown(str(tmp_path / "broken.jpg"), 32)
    assert "\n" not in str(caught.value) and "broken.jpg" not in str(caught.value)
    with pytest.raises(InputError, match="No such file"):
        shown(str(tmp_path / "gone.jpg"), 32)


@pytest.mark.parametrize(
    "content",
    [
        png(20_000, 9_000),
        tiff(20_000, 9_000, b"", bits=(8,), photometric=1),
        b"GIF89a" + struct.pack("<HH", 20_000, 9_000) + encoded(ROUGH, "GIF")[10:],
        encoded(ROUGH, "BMP")[:18] + struct.pack("<II", 20_000, 9_000) + encoded(ROUGH, "BMP")[26:],
        encoded(ROUGH, "JPEG").replace(struct.pack(">HH", 40, 60), struct.pack(">HH", 20_000, 9_000), 1),
        b"RIFF\x2a\0\0\0WEBPVP8X\x0a" + bytes(7) + (16_000).to_bytes(3, "little") * 2 + b"VP8L\x0c\0\0\0" + bytes(12),
    ],
    ids=["png", "tiff", "gif", "bmp", "jpeg", "webp"],
)
def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path, content):
    with pytest.raises(InputError, match=r"over the limit of 178,000,000|can't be decoded"):
        shown(write(tmp_path / "bomb", content), 32)


def test_large_images_below_the_limit_do_not_warn(tmp_path):
    # Pillow warns from 89 million pixels on; this one lacks its pixels, which is what must be reported.
    (tmp_path / "large.png").write_bytes(png(12_000, 12_000))
    with pytest.raises(InputError, match="can't be decoded"):
        shown(str(tmp_path / "large.png"), 32)


def test_a_broken_exif_block_is_noted_and_the_image_read(tmp_path):
    plain = shown(save(tmp_path / "plain.jpg", GREY), 32)
    for number, block in enumerate((exif(6).tobytes()[:-6], b"Exif\0\0rubbish", b"Exif\0\0")):
        file = save(tmp_path / f"{number}.jpg", GREY, exif=block)
        assert (shown(file, 32) == plain).all()
        assert notes(file) == "has a broken EXIF block, so its orientation may be wrong"


@examples(50)
@given(changes=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 255)), max_size=6), cut=st.integers(0, 26))
def test_no_exif_block_makes_an_image_unreadable(tmp_path_factory, changes, cut):
    block = bytearray(exif(6).tobytes())
    for offset, value in changes:
        block[6 + offset % (len(block) - 6)] = value
    file = write(tmp_path_factory.getbasetemp() / "exif.jpg", encoded(GREY, "JPEG", exif=bytes(block[: 6 + cut])))
    assert abs(shown(file, 16).mean() - GREY.mean()) < 3


def test_warnings_are_kept_quiet_in_threads_and_nothing_is_changed_outside(tmp_path):
    file = save(tmp_path / "exif.jpg", GREY, exif=exif(6).tobytes()[:-6])
    before = list(warnings.filters)
    pixels = list(parallel_map(lambda file: shown(file, 32), [file] * 50))
    assert all((each == pixels[0]).all() for each in pixels)
    assert warnings.filters == before


@pytest.mark.slow
@examples(200)
@given(
    kind=st.sampled_from(KINDS),
    changes=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.none() | st.integers(0, 500),
)
def test_damaged_files_give_pixels_or_a_value_error(tmp_path_factory, kind, changes, cut):
    content = bytearray(encoded(ROUGH, kind, **({} if kind in ("GIF", "BMP") else {"exif": exif(6)})))
    for offset, value in changes:
        content[-offset if kind == "TIFF" else offset] = value  # a TIFF's header stands at its end
    file = tmp_path_factory.getbasetemp() / "damaged"
    file.write_bytes(content[:cut])
    try:
        pixels = shown(str(file), 16)
    except InputError as error:
        assert str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.shape[:2] == (16, 16)


def collimated(levels):
    """A picture of so many grey levels with black bars, a white mark and its blurred edges."""
    pixels = np.arange(1600).reshape(40, 40) % levels + 40
    pixels[:8], pixels[8:16, :4], pixels[20, :5] = 0, 255, 100
    return pixels


@pytest.mark.parametrize(
    ("pixels", "note"),
    [
        (np.full((40, 40), 250), "is nearly white"),
        (np.arange(1600).reshape(40, 40) % 10, "is nearly black"),
        (np.arange(1600).reshape(40, 40) % 4 * 60, "has only 4 grey levels"),
        (np.arange(1600).reshape(40, 40) % 256, None),
        (collimated(14), "has only 14 grey levels between its darkest and its brightest"),
        (collimated(60), None),
    ],
)
def test_a_grey_picture_that_shows_little_is_noted(tmp_path, pixels, note):
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "x.png")
    assert decode(str(tmp_path / "x.png"), 40)[1].notes == note
