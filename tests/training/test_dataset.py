"""Images that are not in a GPU's memory: read by a thread, one batch ahead."""

import threading

import numpy as np
import pytest
import torch
from shared import CPU, losses, make_data, on_each_device

from tuning.settings.config import TrialConfig
from tuning.training import frozen
from tuning.training.dataset import ahead, streams
from tuning.training.finetune import finetune


def test_the_next_is_read_while_the_one_before_is_used():
    reading = {number: threading.Event() for number in range(4)}

    def read(number):
        reading[number].set()
        return 10 * number

    for number, found in enumerate(ahead(read, range(4))):
        assert found == 10 * number
        assert number == 3 or reading[number + 1].wait(60)
        assert number >= 2 or not reading[number + 2].is_set()


def test_an_error_is_raised_in_its_place():
    def read(number):
        if number == 2:
            raise OSError("can't be read")
        return number

    found = ahead(read, range(4))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(OSError, match="can't be read"):
        next(found)


def test_nothing_more_is_read_once_no_more_is_asked_for():
    read = []
    found = ahead(read.append, range(100))
    next(found)
    found.close()
    assert len(read) == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("depth", [0, 2, 5])
@pytest.mark.parametrize("policy", ["light", "light mixup=0.4"])
def test_a_trial_is_the_same_with_images_that_are_read_ahead(depth, policy, monkeypatch):
    config = TrialConfig(backbone="test_resnet", unfreeze_depth=depth, augmentation=policy, image_size=32, epochs=2)
    known = list(finetune(config, make_data(), device=CPU, weights=None))
    monkeypatch.setattr(frozen, "streams", lambda images, device: True)
    threads = []
    monkeypatch.setattr(frozen, "ahead", lambda read, groups: threads.append(1) or ahead(read, groups))
    found = list(finetune(config, make_data(), device=CPU, weights=None))
    assert threads
    assert losses(found) == losses(known)


@on_each_device
def test_only_images_that_a_gpu_does_not_hold_are_streamed(device):
    images = np.zeros((2, 8, 8, 1), np.uint8)
    assert streams(images, device) == (device.type != "cpu")
    assert not streams(torch.from_numpy(images), device)
