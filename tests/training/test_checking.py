import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from tuning.settings.config import InputError
from tuning.settings.values import Weights
from tuning.training import backbones, checking
from tuning.training.checking import FOLDER, answer, weights_checked

SIZES = {"test_resnet": [32], "test_vit": [160]}
RANDOM = {"test_resnet": None, "test_vit": None}, []


@pytest.fixture
def without_torch(monkeypatch):
    """As in a driver: torch doesn't seem to be loaded."""
    monkeypatch.setattr(checking, "sys", SimpleNamespace(modules={}, executable=sys.executable))


def test_with_torch_no_other_process_is_asked(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with weights_checked(SIZES, "random") as known:
        assert known(0.0) == RANDOM
    with pytest.raises(InputError, match=r"resnet81.*did you mean"), weights_checked({"resnet81": [32]}, "random"):
        pass


def test_what_has_been_checked_is_remembered_until_it_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights" / "test_resnet.pth"
    file.parent.mkdir()
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    asked, check = [], backbones.check
    monkeypatch.setattr(backbones, "check", lambda *given: asked.append(given) or check(*given))
    for sizes in ([32], [32], [64], [32]):
        with weights_checked({"test_resnet": sizes}, str(file.parent)) as known:
            assert known(0.0) == ({"test_resnet": Weights(file=file)}, [])
    assert [given[1] for given in asked] == [[32], [64]]
    (tmp_path / "cache" / "checked.json").write_text("not JSON")
    tensors = torch.load(file)
    tensors[next(iter(tensors))][0] = math.nan
    torch.save(tensors, file)
    for _ in range(2):  # what is wrong is not remembered
        with (
            pytest.raises(InputError, match="hold NaN or infinity"),
            weights_checked({"test_resnet": [32]}, str(file.parent)),
        ):
            pass


def test_a_worker_answers_once(without_torch):
    answer()  # nothing is asked
    with weights_checked(SIZES, "random", by_worker=True) as known:
        assert known(0.0) is None
        answer()
        assert known(0.0) == RANDOM
        answer()
        assert known(0.0) == RANDOM
    assert FOLDER not in os.environ


def test_all_that_is_wrong_comes_from_the_worker(without_torch):
    with weights_checked({"test_vit": [40, 50, 160]}, "random", by_worker=True) as known:
        worker = threading.Thread(target=answer)
        worker.start()
        with pytest.raises(InputError) as wrong:
            known(60.0)
        worker.join()
    assert [fault.partition(" px")[0] for fault in wrong.value.faults] == [
        "image_size: test_vit can't take 40",
        "image_size: test_vit can't take 50",
    ]


@pytest.mark.slow
def test_where_no_worker_answers_a_process_does(without_torch, tmp_path):
    with weights_checked({"resnet81": [32]}, "random") as known:
        with pytest.raises(InputError, match=r"resnet81.*did you mean"):
            known(60.0)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "test_resnet.pth").write_bytes(b"no weights")
    with weights_checked({"test_resnet": [32]}, str(tmp_path / "damaged"), by_worker=True) as known:
        with subprocess.Popen(["true"]) as gone:
            pass
        Path(os.environ[FOLDER], "taken").write_text(str(gone.pid))  # a worker that has died
        with pytest.raises(InputError, match=r"test_resnet.pth can't be read"):
            known(60.0)


def test_a_worker_may_take_long_and_is_asked_alone(without_torch, monkeypatch):
    """As where it downloads the weights: a second process would download them, too."""
    monkeypatch.setattr(checking, "TAKEN_SECONDS", 0.0)
    with weights_checked(SIZES, "random", by_worker=True) as known:
        Path(os.environ[FOLDER], "taken").write_text(str(os.getpid()))
        monkeypatch.setattr(subprocess, "Popen", None)
        assert known(0.1) is None


@pytest.mark.slow
def test_a_process_that_comes_too_late_leaves_the_answer_to_the_worker(without_torch, monkeypatch):
    monkeypatch.setattr(checking, "TAKEN_SECONDS", 0.0)
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    with weights_checked(SIZES, "random", by_worker=True) as known:
        assert known(0.0) is None
        Path(os.environ[FOLDER], "taken").write_text(str(os.getpid()))  # while the process still starts
        assert started[0].wait() == 0
        assert known(0.1) is None
        Path(os.environ[FOLDER], "taken").unlink()
        answer()
        assert known(0.0) == RANDOM


@pytest.mark.slow
def test_a_process_that_is_killed_is_told(without_torch):
    with weights_checked(SIZES, "random") as known:
        while not (taken := Path(os.environ[FOLDER], "taken")).exists() or not taken.read_text():
            assert known(0.05) is None
        os.kill(int(taken.read_text()), signal.SIGKILL)
        with pytest.raises(InputError, match=r"ended with status -9"):
            known(60.0)


def test_an_error_that_is_no_input_is_raised_with_its_traceback(without_torch):
    with weights_checked({"test_resnet": [32]}, "random", by_worker=True) as known:
        Path(os.environ[FOLDER], "question").write_text(json.dumps([{"test_resnet": ["wide"]}, "random"]))
        answer()
        with pytest.raises(RuntimeError, match=r"Traceback"):
            known(0.0)
