import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from shared import Operations
from torch import nn

from tuning.training.state import Averaged


def test_the_average_is_of_all_steps_at_first_and_of_about_an_epoch_later():
    model = nn.Linear(1, 1, bias=False)
    averaged = Averaged(model, ["weight"], epoch_steps=10)
    for step in range(1, 6):
        model.weight.data.fill_(float(step))
        averaged.update()
    assert averaged.mean["weight"].item() == 3.0
    for _ in range(10):
        model.weight.data.fill_(13.0)
        averaged.update()
    left = (13 - averaged.mean["weight"].item()) / 10
    assert 0.25 < left < math.exp(-1) * 1.1


def test_averages_of_all_tensors_at_once_are_those_of_each_to_the_bit():
    torch.manual_seed(0)
    model, epoch_steps = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 3
    names = list(model.state_dict())
    averaged, each = Averaged(model, names, epoch_steps), {}
    for step in range(1, 8):
        model(torch.randn(2, 3, 8, 8))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        averaged.update()
        for name, tensor in model.state_dict().items():
            share = max(1 - math.exp(-1 / epoch_steps), 1 / step)
            before = each.get(name)
            each[name] = tensor.clone() if before is None or name.endswith("tracked") else before.lerp(tensor, share)
    assert averaged.mean.keys() == {name for name in names if not name.endswith("tracked")}  # which counts batches
    assert all(torch.equal(mean, each[name]) for name, mean in averaged.mean.items())


@given(st.integers(1, 6), st.integers(0, 6))
def test_an_average_that_resumes_equals_one_that_never_stopped(before, after):
    torch.manual_seed(0)
    model = nn.BatchNorm1d(3)
    names = ["weight", "running_mean", "num_batches_tracked"]
    whole, first = (Averaged(model, names, epoch_steps=2) for _ in range(2))
    again = Averaged(model, names, epoch_steps=2)
    for step in range(before + after):
        model(torch.randn(4, 3))
        whole.update()
        (first if step < before else again).update()
        if step == before - 1:
            again.restore({name: tensor.clone() for name, tensor in first.mean.items()}, before)
    assert all(torch.equal(mean, again.mean[name]) for name, mean in whole.mean.items())


def test_the_model_has_its_own_tensors_again_afterwards():
    model = nn.BatchNorm1d(3)
    averaged = Averaged(model, ["weight", "running_mean"], epoch_steps=5)
    averaged.update()
    model.weight.data.fill_(7.0)
    with averaged.in_place():
        assert model.weight.tolist() == [1.0] * 3
    assert model.weight.tolist() == [7.0] * 3


def test_an_update_is_one_operation():
    """Each is a launch on a GPU, and a network has hundreds of tensors."""
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(20)))
    averaged = Averaged(model, list(model.state_dict()), epoch_steps=5)
    with Operations() as done:
        averaged.update()
        averaged.update()
    assert done.names == ["_foreach_lerp_"] * 2
