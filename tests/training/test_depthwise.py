"""Depthwise convolutions: the same outputs, and the gradients that torch gives."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tuning.training import depthwise
from tuning.training.depthwise import speed_up, sums_are_faster, weight_gradient
from tuning.training.models import Models

sides = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    sides,
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_the_sums_are_the_gradient(n, channels, side, kernel, stride, padding):
    if any(size + 2 * pad < width for size, pad, width in zip(side, padding, kernel, strict=True)):
        return
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, channels, *side, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, 1, *kernel, generator=generator, dtype=torch.float64, requires_grad=True)
    outputs = functional.conv2d(inputs, weight, None, stride, padding, 1, channels)
    gradient = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    outputs.backward(gradient)
    torch.testing.assert_close(weight_gradient(inputs, gradient, weight.shape, stride, padding), weight.grad)


@pytest.fixture
def sums(monkeypatch):
    """Shapes of the weights whose gradients were summed."""
    seen = []

    def counted(inputs, gradient, shape, *rest):
        seen.append(tuple(shape))
        return weight_gradient(inputs, gradient, shape, *rest)

    monkeypatch.setattr(depthwise, "weight_gradient", counted)
    return seen


def trained(model, images):
    model.zero_grad()
    logits = model(images)
    functional.cross_entropy(logits, torch.arange(len(images)) % 3).backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_network_trains_on_the_same_gradients(sums):
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=3).to(memory_format=torch.channels_last).train()
    images = torch.randn(6, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    logits, gradients = trained(model, images)
    names = list(model.state_dict())
    speed_up(model)
    assert not sums
    same, faster = trained(model, images)
    assert len(sums) == 8 and {shape[0] for shape in sums} == {240, 480, 672, 1152}  # strided ones pad by themselves
    torch.testing.assert_close(same, logits, rtol=0, atol=0)
    torch.testing.assert_close(faster, gradients, rtol=1e-3, atol=1e-5)
    assert list(model.state_dict()) == names


def test_trials_networks_have_it(sums):
    network = Models().get(
        "test_efficientnet", classes=2, image_size=32, seed=0, weights=None, device=torch.device("cpu")
    )
    network.begin(5, batch_norm="train", head_dropout=0.0)
    network.model(torch.rand(2, 3, 32, 32)).sum().backward()
    assert sums


def test_a_frozen_layer_and_a_bias(sums):
    layer = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    inputs = torch.randn(2, 4, 3, 3, requires_grad=True)
    layer(inputs).square().sum().backward()
    wanted = [inputs.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()]
    inputs.grad = None
    layer.zero_grad()
    speed_up(layer)
    layer(inputs).square().sum().backward()
    torch.testing.assert_close([inputs.grad, layer.weight.grad, layer.bias.grad], wanted)
    assert sums == [(4, 1, 7, 7)]
    layer.requires_grad_(False)
    layer(inputs).sum().backward()
    assert len(sums) == 1


def test_large_outputs_are_left_to_onednn():
    assert sums_are_faster(torch.Size([2, 2]), torch.Size([3, 3]))
    assert sums_are_faster(torch.Size([8, 8]), torch.Size([5, 5]))
    assert not sums_are_faster(torch.Size([4, 4]), torch.Size([3, 3]))
    assert not sums_are_faster(torch.Size([14, 14]), torch.Size([5, 5]))
