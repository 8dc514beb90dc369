"""The page of mistakes: which are shown, and that names are text whatever is in them."""

import html
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tuning.model.mistakes import SHOWN, SIDE, mistakes_page, overlaid, picture, worst

ODD = "<script>alert(1)</script>"
PATHS = ["a \"quoted\" 'name'.png", "😷.png", "two\nlines.png", "<img src=x onerror=alert(1)>.png"]


class Reader(HTMLParser):
    """Collects tags, what they refer to, and text."""

    def __init__(self):
        super().__init__()
        self.tags, self.references, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "onerror", "onclick")]

    def handle_data(self, data):
        self.words.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


def made(classes, paths, maps=True, seed=0):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(len(classes)), size=len(paths))
    targets = (probabilities.argmax(axis=1) + 1) % len(classes)  # all wrong
    tested = pd.DataFrame({"path": paths, "label": [classes[target] for target in targets]})
    found = worst(targets, probabilities)
    pictures = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in found.rows]
    strength = rng.random((len(found.rows), SIDE, SIDE)).astype(np.float32) if maps else None
    return mistakes_page("run <1>", found, tested, probabilities, classes, pictures, strength), found


def test_the_most_confident_mistakes_come_first():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), size=200)
    targets = rng.integers(0, 3, 200)
    found = worst(targets, probabilities)
    sure = probabilities.max(axis=1)
    assert len(found.rows) == SHOWN and (np.diff(sure[found.rows]) <= 0).all()
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != targets)
    assert found.total == len(wrong) and sure[found.rows].min() >= np.sort(sure[wrong])[-SHOWN]
    assert (found.predicted != targets[found.rows]).all()


@pytest.mark.parametrize("maps", [True, False])
def test_names_are_text_and_nothing_is_asked_of_a_network(maps):
    page, _ = made([ODD, "b 'c' \"d\"\ne"], PATHS, maps=maps)
    reader = read(page)
    words = "".join(reader.words)
    assert "script" not in reader.tags and reader.tags.count("img") == len(PATHS) * (1 + maps)
    assert ODD in words and "two\\nlines.png" in words and PATHS[3] in words and PATHS[0] in words
    assert all(ref.startswith("data:") or re.fullmatch(r"[\w.]+\.(png|md)", ref) for ref in reader.references)
    assert ("could not be computed" in words) is not maps


def test_without_mistakes_nothing_is_said_of_maps():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]])
    tested = pd.DataFrame({"path": ["a.png", "b.png"], "label": ["x", "y"]})
    found = worst(np.array([0, 1]), probabilities)
    words = "".join(read(mistakes_page("run", found, tested, probabilities, ["x", "y"], [], None)).words)
    assert "0 of 2 test images misclassified." in words and "There are none." in words
    assert "activation maps" not in words  # none were made, and none failed


@pytest.mark.slow
@given(st.lists(st.text(min_size=1), min_size=2, max_size=4, unique=True))
def test_any_name_is_text(names):
    page, found = made(names, names, maps=False)
    assert set(read(page).tags) <= {
        "html",
        "head",
        "meta",
        "title",
        "link",
        "style",
        "body",
        "main",
        "header",
        "h1",
    } | {*("p", "a", "section", "h2", "div", "figure", "img", "figcaption", "dl", "dt", "dd")}
    assert len(found.rows) == len(names)


def test_many_classes_and_mistakes_stay_small():
    names = [f"class {number}" for number in range(30)]
    page, _ = made(names, [f"{number}.png" for number in range(100)])
    assert len(page) < 6e6 and read(page).tags.count("figure") == SHOWN
    assert "24 most confident" in html.unescape(page)


def test_a_picture_is_shown_larger_or_as_it_was_seen(tmp_path):
    seen = np.full((16, 16, 1), 90, np.uint8)
    Image.fromarray(np.full((50, 80), 200, np.uint8)).save(tmp_path / "there.png")
    there = picture(str(tmp_path / "there.png"), seen, fit="squash", drop_colour=False)
    gone = picture(str(tmp_path / "gone.png"), seen, fit="squash", drop_colour=False)
    assert there.shape == gone.shape == (SIDE, SIDE, 3) and there.mean() == 200 and gone.mean() == 90
    strength = np.zeros((SIDE, SIDE), np.float32)
    assert np.array_equal(overlaid(there, strength), there)
