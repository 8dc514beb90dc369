"""The trainable as Ray drives it, without Ray: what it leaves on disk."""

import itertools
import json
import math
import threading
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from runs import given_by_ray
from safetensors import safe_open
from shared import bring_back, removable, take_away

from tuning.checks.audit import load_checked
from tuning.record import transfer
from tuning.record.journal import best_epoch
from tuning.record.predictions import predictions_file
from tuning.record.storage import files_below
from tuning.record.tables import read_table
from tuning.search import worker as worker_module
from tuning.search.checkpoints import StorageLost, best_file
from tuning.search.plans import write_run
from tuning.search.trainable import FinetuneTrial
from tuning.search.worker import ProcessLost, Worker
from tuning.settings.config import SearchPlan, TrialConfig
from tuning.settings.space_file import parse
from tuning.settings.values import Weights
from tuning.training.digests import digests, plain
from tuning.training.finetune import finetune
from tuning.training.scores import score
from tuning.training.state import State


@pytest.fixture(scope="module")
def plan(folder):
    return SearchPlan(name="run", data=str(folder), weights="random")


@pytest.fixture(scope="module")
def checked(plan):
    return load_checked(plan, [32])


@pytest.fixture
def given(tmp_path, plan, checked):
    """A function that makes what Ray gives a trial."""
    run = tmp_path / "run"
    write_run(
        run,
        plan,
        parse({"fixed": {"backbone": "test_resnet"}, "parameters": {}}, "test"),
        checked.samples,
        checked.audit,
        checked.fingerprint,
    )
    config = TrialConfig(
        backbone="test_resnet",
        unfreeze_depth=5,
        learning_rate=1e-2,
        image_size=32,
        batch_size=8,
        epochs=5,
        augmentation="none",
    )
    common = given_by_ray(run, checked.folders[32], early_loss_epochs=[1])
    return lambda trial_id, **values: (
        common
        | {
            "trial_id": trial_id,
            "origin": "suggested",
            "number": 0,
            "config": config.model_copy(update=values).model_dump(),
        }
    )


@pytest.mark.slow
def test_weights_that_are_not_those_of_the_start_fail_a_trial(given, tmp_path):
    file = tmp_path / "test_resnet.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    own = {"test_resnet": Weights(file=file)}
    weights = {"weights": plain(own), "digests": digests(own)}
    trial = FinetuneTrial(given("t00000") | weights)
    assert step(trial)[0]["epoch"] == 1
    others = {name: tensor + 1 for name, tensor in timm.create_model("test_resnet").state_dict().items()}
    torch.save(others, file)  # while the search runs
    trial.reset_config(given("t00001") | weights)
    (row,) = step(trial)
    assert row["ends"] == "failed" and "test_resnet.pth holds other weights than at the start" in row["reason"]


def step(trial, count=1):
    """The rows of the next steps."""
    return [json.loads(trial.step()["row"]) for _ in range(count)]


def check(given, trial_id, rows):
    """What is on disk must be of the best of these epochs, and have its scores."""
    run = given("t0")["run"]
    best = best_epoch(rows, "val_loss")
    table = pq.read_table(predictions_file(run, trial_id))
    assert int(table.schema.metadata[b"best_epoch"]) == best["epoch"]
    probabilities = np.stack([table[f"probability_{name}"].to_numpy() for name in ("dark", "light")], axis=1)
    targets = np.array([("dark", "light").index(label) for label in table["label"].to_pylist()])
    found = score(np.log(probabilities).astype(np.float32), targets)
    assert found["loss"] == pytest.approx(best["val_loss"], rel=1e-5)
    assert found["accuracy"] == best["val_accuracy"] and float(table.schema.metadata[b"val_loss"]) == best["val_loss"]
    samples = read_table(f"{run}/samples.parquet")
    assert table["path"].to_pylist() == list(samples[samples["split"] == "val"]["path"])


def test_a_stopped_trial_leaves_the_probabilities_of_its_best_epoch_and_so_does_the_last(given, monkeypatch):
    monkeypatch.setattr(worker_module, "CHECKPOINT_SECONDS", math.inf)
    trial = FinetuneTrial(given("t0"))
    first = step(trial, 3)
    assert not predictions_file(given("t0")["run"], "t0").exists()  # nothing is written while it is not needed
    trial.reset_config(given("t1", learning_rate=1e-3))
    check(given, "t0", first)
    second = step(trial, 5)
    assert second[-1]["ends"] == "completed"
    trial.cleanup()
    check(given, "t1", second)


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 4])
def test_a_trial_that_goes_on_keeps_the_probabilities_of_an_epoch_before_its_checkpoint(given, before):
    whole = FinetuneTrial(given("whole"))
    expected = step(whole, 5)
    assert best_epoch(expected, "val_loss")["epoch"] == 3
    begun = FinetuneTrial(given("t0"))
    step(begun, before)
    begun.cleanup()
    check(given, "t0", expected[:before])
    again = FinetuneTrial(given("t0"))
    rows = step(again, 5)  # those of the checkpoint first
    again.cleanup()
    check(given, "t0", expected)
    assert [row["val_loss"] for row in rows] == [row["val_loss"] for row in expected]


def test_a_trial_stopped_among_its_replayed_rows_has_them_already(given):
    begun = FinetuneTrial(given("t0"))
    rows = step(begun, 2)
    begun.cleanup()
    again = FinetuneTrial(given("t0"))
    assert step(again)[0]["replayed"]
    again.reset_config(given("t1"))
    check(given, "t0", rows)


def test_they_come_before_the_checkpoint(given, capsys):
    """A worker may be killed at any instant: a state on disk has its probabilities on disk."""
    run = given("t0")["run"]
    best_file(run, "t0").parent.write_text("in the way")
    trial = FinetuneTrial(given("t0"))
    rows = step(trial)
    trial.cleanup()
    assert "t0: no checkpoint was written" in capsys.readouterr().err
    check(given, "t0", rows)


def test_probabilities_that_cannot_be_written_cost_no_more_than_themselves(given, capsys):
    run = given("t0")["run"]
    predictions_file(run, "t0").parent.write_text("in the way")
    trial = FinetuneTrial(given("t0"))
    assert [row["ends"] for row in step(trial, 5)] == [None] * 4 + ["completed"]
    trial.cleanup()
    assert "t0: no validation probabilities were written" in capsys.readouterr().err
    assert best_file(run, "t0").exists()


@pytest.mark.parametrize(("rate", "epochs"), [(1e5, 2400), (1e6, 600), (1e8, 600)])
def test_checkpoints_take_a_twentieth_of_a_trials_time_on_any_disk(given, monkeypatch, rate, epochs):
    """A clock that moves by a second an epoch, and by what a disk of so many bytes a second takes."""
    now, writing, written, first = [0.0], [0.0], [], []
    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(run, trial_id, state, best, config, *, ended):
        writing[0] += sum(tensor.nbytes for tensor in state.tensors.values()) / rate
        now[0] += sum(tensor.nbytes for tensor in state.tensors.values()) / rate
        written.append(state.history[-1]["epoch"])
        first[:1] = first[:1] or writing

    monkeypatch.setattr(worker_module, "save", slow)
    monkeypatch.setattr(worker_module, "finetune", many_epochs)
    trial = FinetuneTrial(given("t0"))
    for _ in range(epochs):
        now[0] += 1.0
        step(trial)
    assert written and writing[0] - first[0] * (rate < 1e6) <= 0.05 * now[0]  # the first tells how slow the disk is
    assert written[0] >= 30 and (rate < 1e8 or len(written) >= 18)  # every 30 s on a fast disk
    trial.reset_config(given("t1"))  # a trial that others have beaten leaves no more than its best weights
    assert len(written) >= 2


def many_epochs(*given, **named):
    """One epoch, again and again."""
    ((row, snapshot),) = islice(finetune(*given, **named), 1)
    taken = snapshot()
    for epoch in itertools.count(1):

        def again(*, only_best=False, epoch=epoch):
            tensors = {name: value for name, value in taken.tensors.items() if not only_best or "best" in name}
            return State([row | {"epoch": epoch}], tensors)

        yield row | {"epoch": epoch}, again


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_a_gpu_that_does_not_work_is_told_and_is_no_failure_of_the_trial(given, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    trial = FinetuneTrial(given("t00000") | {"device": "auto"})
    (row,) = step(trial)
    assert row.keys() == {"broken"} and row["broken"].startswith("GPU 3 of ")
    assert "Found no NVIDIA driver" in row["broken"]


def test_a_process_that_has_lost_a_gpu_which_works_is_no_failure_of_the_trial(given, monkeypatch):
    """As after an illegal memory access, upon which every call of that process fails."""
    trial = FinetuneTrial(given("t00000") | {"device": "auto"})

    def fails(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(worker_module, "exercise", fails)
    monkeypatch.setattr(worker_module, "gpus_here", lambda: [("a GPU", None)])
    with pytest.raises(ProcessLost, match="illegal memory access"):
        trial.step()


def test_what_a_small_trials_checkpoint_took_says_nothing_of_a_large_ones(given, monkeypatch):
    """It takes a while, however few bytes it has."""
    monkeypatch.setattr(worker_module, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(worker_module, "CHECKPOINT_SHARE", 1.0)
    trial = FinetuneTrial(given("t0", unfreeze_depth=0))
    assert step(trial)[0]["checkpoint"]
    assert trial.worker._bytes_per_second == Worker._bytes_per_second


def test_a_worker_on_a_broken_gpu_leaves_the_trial_to_others(given, monkeypatch):
    """It has been given up, and its last epoch may be older than what another worker has saved meanwhile."""
    trial = FinetuneTrial(given("t0"))
    step(trial, 2)
    trial.worker._device = torch.device("cuda")

    def fails(*given):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(worker_module, "exercise", fails)
    monkeypatch.setattr(worker_module, "gpus_here", lambda: [("a GPU", "RuntimeError: CUDA error")])
    trial.worker._rows = map(fails, [0])
    (row,) = step(trial)
    assert row["broken"].endswith("RuntimeError: CUDA error")
    trial.cleanup()
    assert not best_file(given("t0")["run"], "t0").exists()


def test_a_full_gpu_is_not_taken_for_a_broken_one(given, monkeypatch):
    trial = FinetuneTrial(given("t0") | {"device": "auto"})
    trial.worker._tried = True

    def fails(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker_module, "exercise", fails)
    trial.worker._rows = map(int, ["a shape"])
    assert step(trial)[0]["ends"] == "failed"

    def lost(device):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(worker_module, "exercise", lost)
    monkeypatch.setattr(worker_module, "gpus_here", lambda: [("a GPU", "OutOfMemoryError: CUDA out of memory")])
    trial.worker._rows, trial.worker._replay = map(int, ["a shape"]), []
    with pytest.raises(ProcessLost):
        trial.step()


@pytest.mark.parametrize(("times", "epochs"), [(1, [1, 2, 1, 2, 3, 4, 5]), (2, [1, 2, 1, 2, None])])
def test_a_trial_that_is_out_of_memory_goes_on_once_from_its_last_checkpoint(given, monkeypatch, times, epochs):
    """Wherever it was: in frozen layers, the optimizer's first step or evaluation."""
    left = [times]

    def fails(*given, **named):
        for row, snapshot in finetune(*given, **named):
            if row["epoch"] == 3 and left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield row, snapshot

    monkeypatch.setattr(worker_module, "finetune", fails)
    monkeypatch.setattr(worker_module, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(worker_module, "CHECKPOINT_SHARE", 1.0)
    rows = step(FinetuneTrial(given("t00000")), len(epochs))
    assert [row.get("epoch") for row in rows] == epochs
    assert rows[-1]["ends"] == ("completed" if times == 1 else "out_of_memory")


def test_a_trial_without_a_finite_loss_has_none(given):
    trial = FinetuneTrial(given("t0", learning_rate=1e30, optimizer="sgd"))
    assert step(trial)[0]["ends"] == "diverged"
    trial.cleanup()
    assert not predictions_file(given("t0")["run"], "t0").exists()


@pytest.mark.slow
def test_what_a_storage_did_not_take_is_sent_later(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker_module, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(worker_module, "CHECKPOINT_SHARE", 1.0)
    monkeypatch.setattr(transfer, "RETRY_SECONDS", 0.05)
    place = removable(f"file://{tmp_path}/storage")
    trial = FinetuneTrial(given("t0"))
    trial.worker._config |= {"storage": f"file://{place}"}
    trial.worker._away = True  # as on a node beside which no driver is
    take_away(place)
    assert not step(trial)[0]["checkpoint"]
    assert "t0: no checkpoint was written" in capsys.readouterr().err
    bring_back(place)
    assert step(trial)[0]["checkpoint"]
    names = {"checkpoints/t0.best.safetensors", "checkpoints/t0.state.safetensors", "predictions/t0.parquet"}
    assert files_below(f"file://{place}").keys() == names
    take_away(place)
    last = step(trial, 3)[-1]
    assert (last["ends"], last["checkpoint"]) == ("completed", False)
    mended = threading.Timer(0.3, bring_back, [place])
    mended.start()
    trial.cleanup()
    mended.join()
    with safe_open(place / "checkpoints" / "t0.best.safetensors", framework="np") as file:
        assert int(file.metadata()["best_epoch"]) == 3
    assert not list(Path(given("t0")["run"]).glob("checkpoints/*"))  # nothing of use stays on the node


@pytest.mark.slow
def test_a_stopped_trial_resumes_from_the_storage_and_stays_on_no_other_node(given, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "STOPPED_SHARE", 1e9)
    monkeypatch.setattr(Worker, "_begin", away(Worker._begin))
    there = {"storage": f"file://{tmp_path}/storage", "promotable": True}
    trial = FinetuneTrial(given("t0") | there)
    first = step(trial, 2)
    trial.reset_config(given("t1") | there)  # the driver has stopped it
    names = {"checkpoints/t0.best.safetensors", "checkpoints/t0.state.safetensors", "predictions/t0.parquet"}
    assert files_below(there["storage"]).keys() == names
    run = Path(given("t0")["run"])
    assert not [*run.glob("checkpoints/*"), *run.glob("predictions/*")]
    trial.reset_config(given("t0") | there)  # it is promoted
    again = step(trial, 3)
    assert [row.get("replayed", False) for row in again] == [True, True, False]
    assert [row["val_loss"] for row in again[:2]] == [row["val_loss"] for row in first] and again[2]["epoch"] == 3


def away(begin):
    """Begins trials as on a node beside which no driver is."""

    def begun(self, config):
        begin(self, config | {"storage": None})
        self._config, self._away = config, True

    return begun


def test_a_storage_that_is_lost_before_a_trial_begins_is_no_failure_of_the_trial(given, tmp_path, monkeypatch):
    """It is raised, so that Ray tells the search, which hands the trial out again."""
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.0)
    trial = FinetuneTrial(given("t0"))
    trial.worker._config |= {"storage": f"file://{tmp_path}/storage"}
    trial.worker._away = True
    (tmp_path / "storage" / "checkpoints" / "t0.state.safetensors").mkdir(parents=True)
    (tmp_path / "storage" / "checkpoints" / "t0.best.safetensors").symlink_to("/proc/self/mem")  # fails when it is read
    with pytest.raises(StorageLost):
        trial.step()
