"""Class-activation maps point at what was drawn."""

import numpy as np
import pytest
import torch
from shared import make_data
from torch import nn

from tuning.model.activation import class_map, class_maps
from tuning.model.final import Final
from tuning.settings.config import TrialConfig
from tuning.training import backbones


def built(name, size):
    config = TrialConfig(backbone=name, image_size=size)
    network = backbones.build(name, classes=3, image_size=size, head_dropout=0.0, seed=0, weights=None)
    return network.eval(), config


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_maps_of_every_kind_of_backbone(name):
    size = 160 if name == "test_vit" else 128
    network, config = built(name, size)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    found = class_map(network, config, images, torch.tensor([0, 2]))
    assert found is not None and found.shape[0] == 2 and found.shape[1] == found.shape[2] >= 4
    assert (found >= 0).all() and found.max() > 0
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_map_is_where_the_picture_is():
    """The gradient times the activation of a linear model on means is largest where the picture is bright."""
    network, config = built("test_resnet", 128)
    for module in network.modules():  # positive weights alone: what is bright speaks for every class
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.abs_()
    images = torch.zeros(1, 3, 128, 128)
    images[:, :, :40, 80:] = 1
    (found,) = class_map(network, config, images, torch.tensor([1]))
    row, column = np.unravel_index(int(found.argmax()), found.shape)
    assert row < found.shape[0] / 2 and column >= found.shape[1] / 2


def test_maps_of_an_ensemble_are_averaged():
    members = {"a": built("test_resnet", 32), "b": built("test_efficientnet", 64)}
    final = Final(members, {"a": 0.25, "b": 0.75}, None, {})
    data = {32: make_data(side=32, classes=3), 64: make_data(side=64, classes=3)}
    indices, chosen = data[32].test, np.zeros(len(data[32].test), dtype=np.int64)
    found = class_maps(final, data, indices, chosen, 96)
    each = [class_maps(Final({k: v}, {k: 1.0}, None, {}), data, indices, chosen, 96) for k, v in members.items()]
    assert found.shape == (len(indices), 96, 96) and found.min() >= 0 and found.max() <= 1
    assert np.allclose(found, 0.25 * each[0] + 0.75 * each[1], atol=1e-6)


class NoStages(nn.Module):
    """What can't be cut."""


def test_a_network_without_maps_is_reported(capsys):
    final = Final({"": (NoStages(), TrialConfig(backbone="test_resnet", image_size=32))}, {"": 1.0}, None, {})
    assert class_maps(final, {32: make_data()}, np.array([0]), np.array([0]), 32) is None
    assert "class-activation maps could not be computed" in capsys.readouterr().err
