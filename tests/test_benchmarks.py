"""The smaller benchmarks run, on next to nothing; `test_speed.py` is about the large one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from shared import ONE_CORE

from benchmarks.portfolio import SETS, Flags, as_point, learn, ranks, smoothed
from benchmarks.recorded import curves_of
from tuning.settings.space_file import PORTFOLIO

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    environment = os.environ | ONE_CORE
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_decoding_is_compared_with_the_library(folder, tmp_path):
    for file in folder.glob("*/*.png"):
        (tmp_path / "jpegs" / file.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(file).save(tmp_path / "jpegs" / file.parent.name / f"{file.stem}.jpg")
    said = run("decode.py", "--data", str(tmp_path / "jpegs"), "--image-size", "32", "--rounds", "2")
    assert "60 files, 32 px" in said and re.search(r"resized .* share \d+%", said)


@pytest.mark.slow
def test_memory_is_seen(tmp_path):
    arguments = ["--images", "60", "--image-size", "32", "--epochs", "2", "--out", str(tmp_path)]
    said = run("memory.py", *arguments)
    assert "exit status 0" in said
    for name in ("driver", "trial"):
        assert float(re.search(rf"{name} +(\d+) MiB of its own", said).group(1)) > 100


@pytest.mark.slow
def test_planted_copies_are_found():
    said = run("audit.py", "--images", "60", "--copies", "6", "--image-size", "64")
    assert "60 of them originals" in said and re.search(r"a second time +\d", said)
    found = [int(number) for number in re.findall(r"(\d+) of 6$", said, flags=re.MULTILINE)]
    assert len(found) == 15 and sum(found) >= 0.95 * 6 * 15
    assert re.search(r"pairs of originals +0,", said)
    said = run("audit.py", "--images", "24", "--slices", "12", "--image-size", "64")
    called = int(re.search(r"neighbours called copies +(\d+) of 22", said).group(1))
    assert called <= 1 and "2, 24 of 24 images in them" in said


def test_the_portfolio_is_the_one_that_is_learnt_from_the_curves():
    points = [as_point(each) for each in learn([ranks(curves_of(name)) for name in SETS], Flags().size)]
    assert yaml.safe_load(PORTFOLIO.read_text())["portfolio"] == points


def test_a_portfolio_has_something_for_each_set():
    configuration = ("tf_efficientnet_lite0", "none", 3, 0.00048, "train")
    far = ("tf_efficientnet_lite2", "light", 0, 0.03072, "train")
    tables = [{configuration: 0.0, far: 1.0}, {configuration: 1.0, far: 0.1}]
    assert learn(tables, 2) == [configuration, far]


def test_what_follows_in_a_portfolio_is_good_too():
    """Not any configuration, though none is better on a set than the best of those before it."""
    rates = [3e-5, 0.00012, 0.00048, 0.00192, 0.00768, 0.03072]
    names = [("tf_efficientnet_lite0", "none", depth, rate, "train") for depth in (0, 1, 3) for rate in rates]
    ordered = {name: place / 17 for place, name in enumerate(names)}
    assert learn([ordered], 6) == sorted(names, key=lambda name: smoothed(ordered)[name])[:6]


@pytest.mark.slow
def test_a_search_is_replayed_with_a_portfolio_of_the_other_sets(tmp_path):
    given = ["--curves", "few", "--methods", "product", "ray-optuna-asha", "--slots", "4", "--seeds", "2"]
    said = run("replay.py", *given, "--out", str(tmp_path))
    assert re.search(r"^product +\d+ \[\d+, \d+\] epochs", said, re.MULTILINE), said
