"""Photographs and noise are unlike films; films of the same kind are not."""

import numpy as np
import pytest
import torch
from shared import LARGER

from tuning.model import familiar
from tuning.model.final import usual_features
from tuning.settings.config import TrialConfig
from tuning.training import backbones
from tuning.training.dataset import Data, preparer
from tuning.training.scores import predict_images


def films(count, side=64, seed=0):
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] / side
    found = []
    for _ in range(count):
        x, y, width = rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6), rng.uniform(0.15, 0.25)
        picture = 60 + 120 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / width**2)
        picture += rng.normal(0, 8, (side, side))
        found.append(np.repeat(picture[..., None], 3, axis=2))
    return np.stack(found).clip(0, 255).astype(np.uint8)


def photographs(count, side=64, seed=1):
    """Pictures of many colours and sharp edges."""
    rng = np.random.default_rng(seed)
    found = np.zeros((count, side, side, 3))
    for picture in found:
        picture[:] = rng.uniform(0, 255, 3)
        for _ in range(12):
            top, left = rng.integers(0, side - 12, 2)
            height, width = rng.integers(6, 30, 2)
            picture[top : top + height, left : left + width] = rng.uniform(0, 255, 3)
    return found.clip(0, 255).astype(np.uint8)


def unlike(backbone, size=64):
    images = np.concatenate([films(160), photographs(12)])
    config = TrialConfig(backbone=backbone, image_size=size)
    network = backbones.build(backbone, classes=2, image_size=size, head_dropout=0.0, seed=0, weights=None).eval()
    order = np.arange(160)
    data = Data(images, np.zeros(172, dtype=np.int64), order[:100], order[100:130], order[130:160], ("a", "b"))
    fitted = usual_features(network, config, data, torch.device("cpu"))
    with familiar.recorded(network, fitted["taps"].tolist()) as seen:
        predict_images(network, preparer(images, network, torch.device("cpu")), np.arange(172))
    return familiar.unfamiliar(fitted, familiar.joined(seen, 172)), fitted


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_vit"])
def test_photographs_are_unlike_films(backbone, tmp_path):
    found, fitted = unlike(backbone)
    assert (found[160:] > 1).all()
    assert (found[130:160] > 1).mean() <= 0.2 and (found[100:130] > 1).mean() <= 0.1
    familiar.write(tmp_path, fitted)
    again = familiar.read(tmp_path)
    assert again.keys() == fitted.keys() and all(np.array_equal(again[name], fitted[name]) for name in fitted)
    assert familiar.read(tmp_path / "none") is None


@pytest.mark.slow
@pytest.mark.parametrize("backbone", LARGER)
def test_any_backbone_has_features(backbone):
    size = 256 if "maxvit" in backbone else 224
    network = backbones.build(backbone, classes=2, image_size=size, head_dropout=0.0, seed=0, weights=None).eval()
    names = familiar.taps(network, size)
    with familiar.recorded(network, names) as seen, torch.no_grad():
        network(torch.rand(2, 3, size, size))
    features = familiar.joined(seen, 2)
    assert len(names) == 3 and features.shape[0] == 2 and np.isfinite(features).all()
