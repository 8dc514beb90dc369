"""Depthwise convolutions: the same outputs, and the gradients that torch gives."""

import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tuning.depthwise import speed_up, sums_are_faster, weight_gradient

sides = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(deadline=None)
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


def trained(model, images):
    model.zero_grad()
    logits = model(images)
    functional.cross_entropy(logits, torch.arange(len(images)) % 3).backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_network_trains_on_the_same_gradients():
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=3).to(memory_format=torch.channels_last).train()
    images = torch.randn(6, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    logits, gradients = trained(model, images)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    speed_up(model)
    same, faster = trained(model, images)
    torch.testing.assert_close(same, logits, rtol=0, atol=0)
    torch.testing.assert_close(faster, gradients, rtol=1e-3, atol=1e-5)
    assert model.state_dict().keys() == before.keys()


def test_a_frozen_layer_and_a_bias():
    layer = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    inputs = torch.randn(2, 4, 3, 3, requires_grad=True)
    layer(inputs).square().sum().backward()
    wanted = [inputs.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()]
    inputs.grad = None
    layer.zero_grad()
    speed_up(layer)
    layer(inputs).square().sum().backward()
    torch.testing.assert_close([inputs.grad, layer.weight.grad, layer.bias.grad], wanted)
    layer.requires_grad_(False)
    layer.zero_grad()
    layer(inputs).sum().backward()
    assert layer.weight.grad is None


def test_large_outputs_are_left_to_onednn():
    assert sums_are_faster(torch.Size([2, 2]), torch.Size([3, 3]))
    assert sums_are_faster(torch.Size([8, 8]), torch.Size([5, 5]))
    assert not sums_are_faster(torch.Size([4, 4]), torch.Size([3, 3]))
    assert not sums_are_faster(torch.Size([14, 14]), torch.Size([5, 5]))
