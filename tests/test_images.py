"""Images are decoded right, broken ones are told, and each data set is decoded once."""

import hashlib
import io
import os
import struct
import threading
import time
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
from tuning.config import InputError
from tuning.images import cache_folder, content_hashes, decode, decode_all, open_images, parallel_map

GREY = np.add.outer(np.arange(40) * 4, np.arange(60)).astype(np.uint8)  # [40, 60], brighter to the right and below
COLOURED = np.dstack([GREY, GREY[::-1], GREY[:, ::-1]])
ROUGH = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
ORIENTATION = 0x0112


def save(file: Path, image: Image.Image | np.ndarray, **options) -> str:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, **options)
    return str(file)


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


def draw_set(folder: Path, count: int, *, coloured: tuple[int, ...] = ()) -> list[str]:
    rng = np.random.default_rng(count)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index in range(count):
        shape = (20, 24, 3) if index in coloured else (20, 24)
        files.append(save(folder / f"{index}.png", rng.integers(0, 256, shape, dtype=np.uint8)))
    return files


def hash_all(files: list[str]) -> list[str]:
    return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]


# --- One image -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_grey_and_coloured_images_are_squashed_to_a_square(tmp_path, suffix):
    grey = decode(save(tmp_path / f"grey.{suffix}", GREY), 32)
    coloured = decode(save(tmp_path / f"coloured.{suffix}", COLOURED), 32)
    assert grey.shape == (32, 32) and coloured.shape == (32, 32, 3)
    assert grey.dtype == coloured.dtype == np.uint8
    wanted = np.asarray(Image.fromarray(GREY).resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    assert abs(grey - wanted).max() <= (0 if suffix == "png" else 8)
    assert (np.diff(grey[:, 8:-8].astype(int), axis=1) >= 0).mean() > 0.9


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_of_equal_channels_is_grey(tmp_path, suffix):
    three = decode(save(tmp_path / f"three.{suffix}", np.dstack([GREY] * 3)), 32)
    assert three.shape == (32, 32)
    assert abs(three.astype(int) - decode(save(tmp_path / f"one.{suffix}", GREY), 32)).max() <= 2


def test_bilevel_images_become_black_and_white(tmp_path):
    pixels = decode(save(tmp_path / "1.png", Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE)), 40)
    assert pixels.shape == (40, 40) and pixels.min() == 0 and pixels.max() == 255


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_laid_over_black(tmp_path, mode):
    image = Image.new("RGBA", (40, 40), (200, 200, 200, 255)).convert(mode)
    image.paste(Image.new("RGBA", (20, 40), (200, 200, 200, 0)).convert(mode), (0, 0))
    pixels = decode(save(tmp_path / "alpha.png", image), 40)
    assert pixels.shape == (40, 40)
    assert (pixels[:, :15] == 0).all() and (pixels[:, 25:] == 200).all()


def test_a_transparent_colour_is_black_and_an_opaque_image_is_untouched(tmp_path):
    keyed = Image.fromarray(np.where(GREY > 100, 200, 50).astype(np.uint8)).resize((40, 40), Image.Resampling.NEAREST)
    pixels = decode(save(tmp_path / "keyed.png", keyed, transparency=200), 40)
    assert set(np.unique(pixels)) == {0, 50}
    opaque = Image.fromarray(COLOURED).convert("RGBA")
    assert (decode(save(tmp_path / "a.png", opaque), 32) == decode(save(tmp_path / "b.png", COLOURED), 32)).all()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    plain = decode(save(tmp_path / f"plain.{suffix}", GREY), 32)
    turned = decode(save(tmp_path / f"turned.{suffix}", np.rot90(GREY), exif=exif(6)), 32)
    assert abs(plain.astype(int) - turned).max() <= (1 if suffix == "png" else 12)
    assert abs(plain.astype(int) - decode(save(tmp_path / f"no.{suffix}", np.rot90(GREY)), 32)).max() > 50


def test_a_large_jpeg_is_decoded_at_reduced_size_to_nearly_the_same(tmp_path):
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (60, 90), dtype=np.uint8)).resize((900, 600), Image.Resampling.BICUBIC)
    file = save(tmp_path / "large.jpg", rough, quality=92)
    with Image.open(file) as image:
        whole = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    difference = abs(decode(file, 64) - whole)
    assert difference.mean() < 2 and difference.max() < 25


def test_multi_picture_jpegs_give_their_first_picture(tmp_path):
    file = save(tmp_path / "phone.jpg", GREY, format="MPO", save_all=True, append_images=[Image.new("L", (60, 40))])
    assert decode(file, 32).mean() > 50


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
        decode(file, 32)


def test_dicom_and_16_bit_colour_are_named(tmp_path):
    (tmp_path / "film.png").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 100)
    with pytest.raises(ValueError, match="is a DICOM file"):
        decode(str(tmp_path / "film.png"), 32)
    lines = b"".join(b"\0" + bytes(6 * 8) for _ in range(8))
    parts = (b"IHDR" + struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(lines), b"IEND")
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(ValueError, match="is a 16-bit PNG of mode RGB"):
        decode(str(tmp_path / "deep.png"), 32)


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
        decode(str(tmp_path / "broken.jpg"), 32)
    with pytest.raises(ValueError, match="No such file"):
        decode(str(tmp_path / "gone.jpg"), 32)


def test_large_images_below_the_limit_do_not_warn(tmp_path):
    # Pillow warns from 89 million pixels on; this one lacks its pixels, which is what must be told.
    (tmp_path / "large.png").write_bytes(png_header(12_000, 12_000))
    with pytest.raises(ValueError, match="can't be decoded"):
        decode(str(tmp_path / "large.png"), 32)


def test_a_warning_of_pillow_is_an_error_and_changes_nothing_outside(tmp_path):
    broken = exif(6).tobytes()[:-6]
    file = save(tmp_path / "exif.jpg", GREY, exif=broken)
    before = list(warnings.filters)
    with pytest.raises(ValueError, match="can't be decoded"):
        decode(file, 32)
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
        pixels = decode(str(file), 16)
    except ValueError as error:
        assert str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.shape[:2] == (16, 16)


# --- A data set ------------------------------------------------------------------------------------------------------


def test_parallel_map_keeps_the_order_and_looks_a_little_ahead():
    asked = []

    def items():
        for number in range(1000):
            asked.append(number)
            yield number

    results = parallel_map(lambda number: number * 2, items())
    assert next(results) == 0
    assert len(asked) <= 4 * (os.cpu_count() or 1)
    assert list(results) == [number * 2 for number in range(1, 1000)]


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("FINETUNE_SEARCH_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "finetune-search"


def test_hashes_are_remembered_until_a_file_changes(tmp_path):
    files = draw_set(tmp_path / "set", 4)
    cache = tmp_path / "cache"
    assert content_hashes([*files, files[0]], cache) == hash_all([*files, files[0]])

    # The same size and time: what was remembered is given, since the file is not read.
    status = os.stat(files[1])
    old, content = hash_all(files), Path(files[1]).read_bytes()
    Path(files[1]).write_bytes(content[::-1])
    os.utime(files[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content_hashes(files, cache) == old

    os.utime(files[1], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert content_hashes(files, cache) == hash_all(files) != old
    assert content_hashes(files[2:], cache) == old[2:]
    assert [file.name for file in cache.iterdir()] == ["hashes.parquet"]


def test_unreadable_files_and_broken_memory_of_hashes_are_told(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: can't be read"):
        content_hashes([str(tmp_path / "gone.png")], tmp_path)
    (tmp_path / "hashes.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="delete it"):
        content_hashes([], tmp_path)


@pytest.mark.parametrize("coloured", [(), (0,), (3,), (9,)])
def test_the_array_holds_every_image_in_as_many_channels_as_needed(tmp_path, coloured):
    files = draw_set(tmp_path / "set", 10, coloured=coloured)
    folder, unreadable = decode_all(
        files, hash_all(files), 16, folder=tmp_path, disk_cache_bytes=10**9, map=parallel_map
    )
    array = open_images(folder)
    assert unreadable == {} and array.dtype == np.uint8 and not array.flags.writeable
    assert array.shape == (10, 16, 16, 3 if coloured else 1)
    for file, pixels in zip(files, array, strict=True):
        wanted = decode(file, 16)
        assert (pixels == (wanted if wanted.ndim == 3 else wanted[:, :, None])).all()
    assert [file.name for file in folder.iterdir()] == ["images.npy"]
    assert [path.name for path in (tmp_path / "images").iterdir()] == [folder.name]


def test_a_cached_set_is_not_decoded_again(tmp_path):
    files = draw_set(tmp_path / "set", 3)
    decoded = partial(decode_all, hashes=hash_all(files), folder=tmp_path, disk_cache_bytes=10**9)
    folder, _ = decoded(files, image_size=16)
    os.utime(folder, (0, 0))
    assert decoded(["gone"] * 3, image_size=16) == (folder, {})
    assert folder.stat().st_mtime > 0
    assert decoded(files, image_size=20)[0] != folder
    assert decode_all(files[::-1], hash_all(files)[::-1], 16, folder=tmp_path, disk_cache_bytes=10**9)[0] != folder


def test_with_unreadable_files_nothing_is_cached(tmp_path):
    files = draw_set(tmp_path / "set", 4, coloured=(3,))
    Path(files[0]).write_bytes(b"")
    Path(files[2]).write_text("hello")
    folder, unreadable = decode_all(files, hash_all(files), 16, folder=tmp_path, disk_cache_bytes=10**9)
    assert not folder.exists() and not list((tmp_path / "images").iterdir())
    assert {index: reason.split()[1] for index, reason in unreadable.items()} == {0: "empty", 2: "neither"}


def test_an_interrupted_decoding_leaves_nothing(tmp_path):
    files = draw_set(tmp_path / "set", 2)

    def interrupted(function, items):
        yield function(items[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_all(files, hash_all(files), 16, folder=tmp_path, disk_cache_bytes=10**9, map=interrupted)
    assert not list((tmp_path / "images").iterdir())


def test_two_at_once_share_what_the_first_finishes(tmp_path):
    files = draw_set(tmp_path / "set", 3)
    results = []

    def run():
        results.append(decode_all(files, hash_all(files), 16, folder=tmp_path, disk_cache_bytes=10**9, map=together))

    barrier = threading.Barrier(2)

    def together(function, items):
        barrier.wait(timeout=30)  # both are decoding now
        return map(function, items)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] and len(results) == 2
    assert open_images(results[0][0]).shape == (3, 16, 16, 1)
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_least_recently_used_sets_go_first_and_abandoned_ones_always(tmp_path):
    sets = [draw_set(tmp_path / f"set{count}", count) for count in (1, 2, 3)]
    one_bytes = 128 + 16 * 16
    keep_all = {"folder": tmp_path, "disk_cache_bytes": 10**9}
    folders = [decode_all(files, hash_all(files), 16, **keep_all)[0] for files in sets[:2]]
    os.utime(folders[0], (2000, 2000))
    os.utime(folders[1], (1000, 1000))
    living, abandoned = (tmp_path / "images" / f"{images.DECODING}{name}" for name in ("living", "abandoned"))
    living.mkdir()
    abandoned.mkdir()
    hours_ago = time.time() - 2 * images.ABANDONED_S
    os.utime(abandoned, (hours_ago, hours_ago))
    third, _ = decode_all(
        sets[2], hash_all(sets[2]), 16, folder=tmp_path, disk_cache_bytes=one_bytes + 128 + 3 * 16 * 16
    )
    assert set((tmp_path / "images").iterdir()) == {folders[0], third, living}
    first, _ = decode_all(sets[1], hash_all(sets[1]), 16, folder=tmp_path, disk_cache_bytes=0)
    assert set((tmp_path / "images").iterdir()) == {first, living}


def test_too_little_disk_is_told_before_a_byte_is_written(tmp_path):
    with pytest.raises(InputError, match="FINETUNE_SEARCH_CACHE"):
        decode_all(range(10**12), ["x"], 1024, folder=tmp_path, disk_cache_bytes=10**9)
    assert not list((tmp_path / "images").iterdir())
