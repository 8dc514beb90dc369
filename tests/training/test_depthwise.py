"""Depthwise convolutions: the same outputs, and the gradients that torch gives."""

import pytest
import timm
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional

from tuning.training import depthwise
from tuning.training.depthwise import by_columns, faster, speed_up, summed
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
@example(1, 1, (1, 1), (7, 7), (1, 1), (3, 3))  # its last column reads padding alone
def test_sums_and_columns_are_the_gradient(n, channels, side, kernel, stride, padding):
    if any(size + 2 * pad < width for size, pad, width in zip(side, padding, kernel, strict=True)):
        return
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, channels, *side, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, 1, *kernel, generator=generator, dtype=torch.float64, requires_grad=True)
    for step in (stride, (1, 1)):
        outputs = functional.conv2d(inputs, weight, None, step, padding, 1, channels)
        gradient = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        (wanted,) = torch.autograd.grad(outputs, weight, gradient)
        torch.testing.assert_close(summed(inputs, gradient, weight.shape, step, padding), wanted)
    torch.testing.assert_close(by_columns(inputs, gradient, weight.shape, step, padding), wanted)


@pytest.fixture
def computed(monkeypatch):
    """Ways and shapes of the weights whose gradients were computed here."""
    seen = []
    for way in (summed, by_columns):

        def counted(inputs, gradient, shape, *rest, way=way):
            seen.append((way, tuple(shape)))
            return way(inputs, gradient, shape, *rest)

        monkeypatch.setattr(depthwise, way.__name__, counted)
    return seen


def trained(model, images):
    model.zero_grad()
    logits = model(images)
    functional.cross_entropy(logits, torch.arange(len(images)) % 3).backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("side", [64, 75])
def test_a_network_trains_on_the_same_gradients(computed, side):
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=3).to(memory_format=torch.channels_last).train()
    images = torch.randn(6, 3, side, side).contiguous(memory_format=torch.channels_last)
    logits, gradients = trained(model, images)
    names = list(model.state_dict())
    speed_up(model)
    assert not computed
    same, faster = trained(model, images)
    speed_up(model)  # once more changes nothing
    assert {way for way, _ in computed} == {summed, by_columns}
    torch.testing.assert_close(same, logits, rtol=0, atol=0)
    torch.testing.assert_close(faster, gradients, rtol=1e-3, atol=1e-5)
    assert list(model.state_dict()) == names


@given(sides, st.integers(1, 7), st.integers(1, 3))
def test_same_padding_is_timms(side, kernel, stride):
    torch.manual_seed(0)
    layer = Conv2dSame(4, 4, kernel, stride=stride, groups=4, bias=True)
    inputs = torch.randn(2, 4, *side).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = layer(inputs)
        speed_up(layer)
        found = layer(inputs)
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_trials_networks_have_it(computed):
    network = Models().get(
        "test_efficientnet", classes=2, image_size=32, seed=0, weights=None, device=torch.device("cpu")
    )
    network.begin(5, batch_norm="train", head_dropout=0.0)
    network.model(torch.rand(2, 3, 32, 32)).sum().backward()
    assert computed


def test_a_frozen_layer_and_a_bias(computed):
    layer = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    inputs = torch.randn(2, 4, 3, 3, requires_grad=True)
    layer(inputs).square().sum().backward()
    wanted = [inputs.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()]
    inputs.grad = None
    layer.zero_grad()
    speed_up(layer)
    layer(inputs).square().sum().backward()
    torch.testing.assert_close([inputs.grad, layer.weight.grad, layer.bias.grad], wanted)
    assert computed == [(summed, (4, 1, 7, 7))]
    layer.requires_grad_(False)
    layer(inputs).sum().backward()
    assert len(computed) == 1


@pytest.mark.parametrize(
    ("output", "kernel", "stride", "way"),
    [
        ((2, 2), (3, 3), (1, 1), summed),
        ((4, 4), (5, 5), (1, 1), summed),
        ((8, 8), (5, 5), (1, 1), by_columns),
        ((14, 14), (7, 7), (1, 1), by_columns),
        ((8, 8), (5, 5), (2, 2), summed),
        ((14, 14), (5, 5), (2, 2), None),
        ((4, 4), (3, 3), (1, 1), None),
        ((14, 14), (5, 3), (1, 1), None),
    ],
)
def test_the_rest_is_left_to_onednn(output, kernel, stride, way):
    assert faster(output, kernel, stride) is way
