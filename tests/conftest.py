"""What the tests share: a tiny labelled folder, and the cache and working folder kept out of the user's."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoded images of all tests."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FINETUNE_SEARCH_CACHE"] = str(folder)
    return folder


def draw_folder(folder: Path, *, classes: tuple[str, ...] = ("dark", "light"), count: int = 30, side: int = 40) -> Path:
    """Class folders of noisy grey PNG images that differ in brightness, easily told apart."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            level = 60 + 120 * index / max(len(classes) - 1, 1)
            pixels = rng.normal(level, 40, (side, side)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 30 images each, without splits."""
    return draw_folder(tmp_path_factory.mktemp("data") / "images")
