"""Batch norms folded into convolutions: the same logits, the same gradients, and no folding where it would be wrong."""

import gc
import weakref

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from tuning.training import backbones
from tuning.training.folding import FOLDED, fold

SIDE = 32


def images(count=4):
    pixels = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return pixels.contiguous(memory_format=torch.channels_last)


def folded(model):
    return sum(type(module) in FOLDED.values() for module in model.modules())


def built(name):
    """A model whose batch norms have statistics and weights of their own."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor += 0.1 * torch.randn(len(tensor))
            module.running_var *= 0.5 + torch.rand(module.num_features)
    return model


def gradients(model):
    model.zero_grad()
    functional.cross_entropy(model(images()), torch.arange(4) % 3).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "tf_efficientnet_lite0", "densenet121"])
def test_a_folded_model_gives_the_same_logits_and_gradients(name):
    model = built(name)
    stages = [[name for name, _ in model.named_parameters()]]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = model.train()(images()).detach()
    model.load_state_dict(tensors)
    model.eval()
    with torch.no_grad():
        logits = model(images())
    wanted = gradients(model)

    fold(model, stages, SIDE)
    assert folded(model) > 8
    torch.testing.assert_close(dict(model.state_dict()), tensors, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.train()(images()), trained)  # each batch's own statistics, as before


def test_a_frozen_batch_norm_leaves_the_gradients_of_the_weights():
    model = built("test_resnet")
    names = [name for name, _ in model.named_parameters()]
    backbones.unfreeze(model, [names], 1, batch_norm="frozen")
    backbones.train_mode(model)
    wanted = gradients(model)
    fold(model, [names], SIDE)
    assert folded(model)
    found = gradients(model)
    assert found.keys() == wanted.keys() and not any("bn" in name for name in found)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


class Small(nn.Module):
    """A convolution and a batch norm, and whatever a test makes of their outputs."""

    def __init__(self, combine):
        super().__init__()
        self.conv, self.norm, self.combine = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), combine

    def forward(self, inputs):
        return self.combine(self, inputs).mean((2, 3))


@pytest.mark.parametrize(
    ("combine", "count"),
    [
        (lambda model, inputs: model.norm(model.conv(inputs)), 1),
        (lambda model, inputs: model.norm(read := model.conv(inputs)) + read, 0),
        (lambda model, inputs: model.norm(model.conv(inputs)) + model.norm(inputs), 0),
        (lambda model, inputs: model.norm(model.conv(model.conv(inputs))), 0),
        (lambda model, inputs: model.norm(2 * model.conv(inputs)), 0),
        (lambda model, inputs: model.norm(model.conv(inputs).mul_(2)), 0),
    ],
    ids=["in turn", "output read twice", "norm run twice", "convolution run twice", "something between", "in place"],
)
def test_only_what_nothing_else_reads_is_folded(combine, count):
    model = Small(combine)
    model.norm.running_mean += 0.3
    stages = [["conv.weight", "norm.weight"]]
    model.eval()
    with torch.no_grad():
        wanted = model(images())
        fold(model, stages, SIDE)
        assert folded(model) == count
        torch.testing.assert_close(model(images()), wanted)
    assert model.norm.running_var.tolist() == [1, 1, 1]


def test_a_pair_that_a_cut_could_part_is_not_folded():
    model = Small(lambda model, inputs: model.norm(model.conv(inputs)))
    fold(model, [["conv.weight"], ["norm.weight"]], SIDE)
    assert not folded(model)


def test_a_dropped_model_is_freed_at_once():
    model = built("test_resnet")
    fold(model, [[name for name, _ in model.named_parameters()]], SIDE)
    convolution = weakref.ref(model.conv1[0] if isinstance(model.conv1, nn.Sequential) else model.conv1)
    assert folded(model)
    gc.disable()
    try:
        del model
        assert convolution() is None
    finally:
        gc.enable()
