"""Copies are found however they were made, and pictures that only look alike are not called copies."""

import importlib.util
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from tuning.checks.alignment import SIDE
from tuning.checks.duplicates import bars_of, near_duplicates, shrunk
from tuning.data.decoding import decode
from tuning.data.phantoms import CLASSES, draw_phantom

N = 16  # originals of each source
spec = importlib.util.spec_from_file_location("audit", Path(__file__).parents[2] / "benchmarks" / "audit.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def photo(number):
    """A coloured picture with shapes, shades and texture."""
    rng = np.random.default_rng([1, number])
    noise = sum(
        rng.normal(0, 8, 3) * ndimage.gaussian_filter(rng.normal(size=(120, 120, 3)), (s, s, 0)) * s for s in (1, 3, 9)
    )
    pixels = 128 + 3 * noise
    y, x = np.mgrid[:120, :120]
    for _ in range(6):
        middle, radius = rng.uniform(0, 120, 2), rng.uniform(8, 35)
        pixels[np.hypot(y - middle[0], x - middle[1]) < radius] *= rng.uniform(0.4, 1.4, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def film(number):
    return Image.fromarray(draw_phantom(CLASSES[number % 3], np.random.default_rng([2, number]), 96))


def ct_slice(number):
    return Image.fromarray(benchmark.scan(np.random.default_rng([3, number]), 1, 0.02)[0])


def seen(images, quality=85):
    """The images as JPEG files, decoded at 64 px."""
    pictures = []
    for image in images:
        file = BytesIO()
        image.convert("L").save(file, "JPEG", quality=quality)
        pictures.append(np.asarray(Image.open(file).resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
    return np.stack(pictures)


def copies_of(found):
    return set(zip(found.a[found.copies].tolist(), found.b[found.copies].tolist(), strict=True))


def without_edge(image, left=0.05, top=0.05, right=0.05, bottom=0.05):
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


COPIES = {
    "encoded": lambda image: image,
    "smaller": lambda image: image.resize([side * 6 // 10 for side in image.size]),
    "larger": lambda image: image.resize([side * 2 for side in image.size]),
    "mirrored": ImageOps.mirror,
    "upside down": ImageOps.flip,
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "cropped": without_edge,
    "cropped at one side": lambda image: without_edge(image, 0.05, 0, 0, 0),
    "mirrored and cropped": lambda image: without_edge(ImageOps.mirror(image)),
}


@pytest.fixture(scope="module", params=[film, photo], ids=["films", "photos"])
def searched(request, tmp_path_factory):
    """Pairs found among originals with one copy of each kind."""
    folder = tmp_path_factory.mktemp("images")
    originals = [request.param(number) for number in range(N)]
    copies = [change(originals[number].copy()) for number, change in enumerate(COPIES.values())]
    for number, image in enumerate(originals + copies):
        image.save(folder / f"{number:02d}.jpg", quality=80)
    files = sorted(folder.glob("*.jpg"))
    images = np.stack([decode(str(file), 64, drop_colour=True)[0] for file in files])
    return near_duplicates(shrunk(images[..., None], np.arange(len(images)), SIDE)[:, :, :, 0])


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found(searched, kind):
    number = list(COPIES).index(kind)
    found = dict(zip(zip(searched.a.tolist(), searched.b.tolist(), strict=True), searched.copies, strict=True))
    assert found.get((number, N + number), False)


def test_nothing_else_is_called_a_copy(searched):
    assert ((searched.b - searched.a)[searched.copies] == N).all()
    assert (searched.a < searched.b).all() and searched.copies.sum() == len(COPIES)


CROPS = {  # left, top, right, bottom
    "60%, top left": (0, 0, 0.4, 0.4),
    "60%, top right": (0.4, 0, 0, 0.4),
    "60%, bottom left": (0, 0.4, 0.4, 0),
    "60%, bottom right": (0.4, 0.4, 0, 0),
    "67%, top left": (0, 0, 0.33, 0.33),
    "75%, bottom right": (0.25, 0.25, 0, 0),
    "75%, middle": (0.125, 0.125, 0.125, 0.125),
    "75%, left": (0, 0, 0.25, 0),
}


@pytest.mark.parametrize("draw", [film, photo, ct_slice], ids=["films", "photos", "slices"])
def test_large_crops_are_found(draw):
    originals = [draw(number) for number in range(N)]
    crops = [without_edge(originals[number], *box) for number, box in enumerate(CROPS.values())]
    crops += [ImageOps.mirror(crop) for crop in crops[::2]]
    of = [*range(len(CROPS)), *range(0, len(CROPS), 2)]
    found = copies_of(near_duplicates(seen(originals + crops)))
    wanted = {(number, N + place) for place, number in enumerate(of)}
    assert len(wanted & found) >= len(wanted) - 1
    origin = [*range(N), *of]
    assert all(origin[a] == origin[b] for a, b in found)


@pytest.mark.parametrize("thickness", [0.005, 0.01, 0.02])
def test_neighbouring_slices_are_a_sequence_and_no_copies(thickness):
    slices = [benchmark.scan(np.random.default_rng([4, number]), 12, thickness) for number in range(3)]
    found = near_duplicates(seen([Image.fromarray(pixels) for stack in slices for pixels in stack]))
    pairs = set(zip(found.a[found.steps].tolist(), found.b[found.steps].tolist(), strict=True))
    neighbours = {(first, first + 1) for first in range(36) if first % 12 < 11}
    assert len(neighbours & copies_of(found)) <= 1 and len(neighbours & pairs) >= 32
    assert (found.a // 12 == found.b // 12)[found.steps].all()
    assert not (found.steps & found.copies).any()


@pytest.mark.parametrize("of", [0, 5, 11])
def test_a_copy_of_a_slice_is_still_a_copy(of):
    slices = [Image.fromarray(pixels) for pixels in benchmark.scan(np.random.default_rng(5), 12, 0.02)]
    found = near_duplicates(seen([*slices, slices[of]]))
    assert copies_of(found) == {(of, 12)} and found.steps.sum() >= 11
    found = near_duplicates(seen([slices[of], *slices]))
    assert copies_of(found) == {(0, of + 1)} and found.steps.sum() >= 11


@pytest.mark.slow
@pytest.mark.parametrize("draw", [film, photo, ct_slice], ids=["films", "photos", "slices"])
def test_many_copies_are_no_sequence(draw):
    changes = [change for kind, change in COPIES.items() if "crop" not in kind]
    qualities = (95, 85, 75, 65)
    pictures = [seen([change(draw(number)) for change in changes], qualities[number]) for number in range(4)]
    again = [seen([draw(number)], quality) for number in range(4) for quality in (90, 80, 70, 60)]
    found = near_duplicates(np.concatenate([*pictures, *again]))
    assert not found.steps.any()


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_pictures(n):
    pictures = np.stack([np.asarray(film(0), np.uint8)[:SIDE, :SIDE]] * n) if n else np.empty((0, SIDE, SIDE), np.uint8)
    found = near_duplicates(pictures)
    assert len(found.a) == n * (n - 1) // 2 and found.copies.all()


def test_flat_pictures_and_noise_are_no_copies():
    rng = np.random.default_rng(0)
    flat = np.full((4, SIDE, SIDE), 30, dtype=np.uint8)
    noise = rng.normal(128, 30, (20, SIDE, SIDE)).astype(np.uint8)
    assert len(near_duplicates(np.concatenate([flat, noise])).a) == 0


@pytest.mark.parametrize("side", [32, 48, 64, 100])
def test_any_side_will_do(side):
    images = np.stack([np.asarray(film(number).resize((side, side))) for number in range(8)])
    cropped = np.asarray(without_edge(film(0)).resize((side, side)))
    found = near_duplicates(shrunk(np.stack([*images, cropped])[..., None], np.arange(9), SIDE)[..., 0])
    assert list(zip(found.a[found.copies], found.b[found.copies], strict=True)) == [(0, 8)]


def test_the_picture_lies_between_its_bars(tmp_path):
    rows = []
    for number, size in enumerate([(80, 40), (40, 80), (60, 60), (80, 79)]):
        file = tmp_path / f"{number}.png"
        Image.fromarray(np.full(size[::-1], 100 + number, np.uint8)).save(file)
        rows.append(decode(str(file), 32, fit="letterbox"))
    images = np.stack([image for image, _ in rows])[..., None]
    bars = bars_of(images, pd.DataFrame([facts._asdict() for _, facts in rows]))
    assert bars.tolist() == [[8, 0], [0, 8], [0, 0], [0, 0]]
    for number, bar in enumerate(bars):
        assert np.allclose(shrunk(images, np.array([number]), 16, grey=True, bars=bar), 100 + number)


def test_channels_are_kept_or_averaged():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    means = images.reshape(3, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    assert np.allclose(shrunk(images, np.array([2, 0]), 4), means[[2, 0]], atol=0.51)
    assert np.allclose(shrunk(images, np.arange(3), 8, grey=True)[..., 0], images.mean(axis=3), atol=0.51)
