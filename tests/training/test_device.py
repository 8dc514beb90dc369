"""The device that trials run on."""

import pytest
import torch

from tuning.settings.config import InputError
from tuning.training.device import chosen, exercise, gpus

CUDA, MPS = torch.cuda.is_available(), torch.backends.mps.is_available()


def test_a_device_is_chosen_by_name_or_the_gpu_if_there_is_one():
    assert chosen("cpu").type == "cpu"
    assert chosen("auto").type == ("cuda" if CUDA else "mps" if MPS else "cpu")
    for name, there in (("cuda", CUDA), ("mps", MPS)):
        if there:
            assert chosen(name).type == name
        else:
            with pytest.raises(InputError, match=f"--device {name}: torch finds no such device here"):
                chosen(name)


def test_what_works_is_told_from_what_does_not():
    exercise(torch.device("cpu"))
    found = gpus()
    assert found
    assert all(wrong is None for _, wrong in found) if CUDA or MPS else "Found no NVIDIA driver" in found[0][1]
