"""Plots of two classes and of thirty, with names that no plot was made for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tuning.show.plots import LABEL, PLOTS, shortened, write_plots

ODD = [
    "<script>alert(1)</script>",
    "\"a\" 'b', $x^2$",
    "_😷\nnew line",
    "a class with a name that is too long for a plot",
]


def predictions(classes, images, seed=0):
    rng = np.random.default_rng(seed)
    targets = np.arange(images) % classes
    logits = rng.normal(size=(images, classes)) + 2.5 * np.eye(classes)[targets]
    return targets, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("names", "images"),
    [
        pytest.param(["dark", "light"], 40, id="two classes"),
        pytest.param(ODD, 60, id="odd names", marks=pytest.mark.slow),
        pytest.param(
            [f"class number {n}: {ODD[n % 4]}" for n in range(30)], 90, id="thirty classes", marks=pytest.mark.slow
        ),
    ],
)
def test_plots_are_drawn(tmp_path, names, images):
    targets, probabilities = predictions(len(names), images)
    write_plots(tmp_path, names, targets, probabilities, 1.4)
    for name in PLOTS:
        with Image.open(tmp_path / name) as image:
            picture = image.convert("RGB")
        width, height = picture.size
        assert 500 < width < 2500 and 500 < height < 2500
        assert picture.getpixel((2, 2)) == (255, 255, 255) and len(picture.getcolors(width * height)) > 20


@pytest.mark.slow
def test_a_thousand_classes_make_no_larger_picture(tmp_path):
    targets, probabilities = predictions(1000, 2000)
    write_plots(tmp_path, [f"class {number}" for number in range(1000)], targets, probabilities, 1.4)
    with Image.open(tmp_path / PLOTS[0]) as picture:
        assert max(picture.size) < 6000


@pytest.mark.slow
def test_a_class_that_is_not_in_the_test_set(tmp_path):
    targets, probabilities = predictions(3, 30)
    write_plots(tmp_path, ["a", "b", "c"], np.where(targets == 2, 0, targets), probabilities, 1.0)
    write_plots(tmp_path, ["a", "b", "c"], np.zeros_like(targets), probabilities, 1.0)


@given(st.lists(st.text(min_size=1), min_size=2, max_size=8, unique=True))
def test_shortened_names_are_short_and_different(names):
    short = shortened(names)
    assert len(set(short)) == len(names)
    assert all(name.isprintable() and len(name) <= LABEL + 4 for name in short)
