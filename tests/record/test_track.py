"""Tracking in MLflow and TensorBoard, read back by the real ones."""

import logging
import os
import socket
import sys
import time
from types import SimpleNamespace

import pytest
from runs import make_record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tuning.record import track
from tuning.record.journal import FINAL, Row, best_epoch
from tuning.record.track import MLflow, TensorBoard, check_installed, tracking
from tuning.settings.config import InputError, SearchPlan

EPOCHS = 4


def plan(**settings):
    return SearchPlan(name="x", trials=9, epochs=EPOCHS, metric="val_loss", **settings)


@pytest.fixture
def record():
    return make_record(trials=9, epochs=EPOCHS, running=1, finalists=False)


def again(trial, epochs, by=0.001):
    """A trial whose later epochs were voided and have been run again."""
    last = max(row["seq"] for row in trial.rows) + 1000
    kept, voided = trial.rows[:epochs], trial.rows[epochs:]
    redone = [
        Row(dict(row) | {"seq": last + place, "val_loss": row["val_loss"] + by}) for place, row in enumerate(voided)
    ]
    trial.rows = [*kept, *redone]


# ---- TensorBoard ------------------------------------------------------------------------------------------------


def curve(folder, trial_id, tag="val_loss"):
    accumulator = EventAccumulator(str(folder / "tensorboard" / trial_id))
    accumulator.Reload()
    return {event.step: pytest.approx(event.value, rel=1e-6) for event in accumulator.Scalars(tag)}


def losses(trial):
    return {row["epoch"]: row["val_loss"] for row in trial.rows if row["val_loss"] is not None}


def test_tensorboard_shows_each_epoch(tmp_path, record):
    tracker = TensorBoard(tmp_path, plan(), record.trials.values())
    tracker.close([])
    for trial in record.trials.values():
        assert curve(tmp_path, trial.trial_id) == losses(trial)
        best = min(losses(trial).values())
        assert curve(tmp_path, trial.trial_id, "best_val_loss")[max(losses(trial))] == best
    accumulator = EventAccumulator(str(tmp_path / "tensorboard" / "t00001"))
    accumulator.Reload()
    assert "hparams" in accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name


def test_a_row_of_a_version_without_one_of_the_columns_is_tracked(record):
    trial = next(iter(record.trials.values()))
    row = {name: value for name, value in trial.rows[0].items() if name != "early_loss"}
    logged = track.values(trial, row, "val_loss")
    assert "early_loss" not in logged and logged["val_loss"] == row["val_loss"]


def test_tensorboard_forgets_voided_epochs_and_continues_in_a_second_file(tmp_path, record):
    trial = record.trials["t00008"]
    tracker = TensorBoard(tmp_path, plan(), record.trials.values())
    again(trial, 1)
    tracker.show(trial)
    assert curve(tmp_path, "t00008") == losses(trial)
    tracker.close([])
    (file,) = (tmp_path / "tensorboard" / "t00008").iterdir()
    file.rename(file.with_name(file.name.replace("tfevents.1", "tfevents.0")))  # as if begun earlier
    ended = {path: path.stat().st_size for path in (tmp_path / "tensorboard" / "t00001").iterdir()}
    trial.rows = trial.rows[:2]
    again(trial, 1, by=0.5)
    trial.status, trial.ended_at = "completed", time.time()
    resumed = TensorBoard(tmp_path, plan(), record.trials.values())
    resumed.close([])
    assert len(list((tmp_path / "tensorboard" / "t00008").iterdir())) == 2
    assert curve(tmp_path, "t00008") == losses(trial)
    assert {path: path.stat().st_size for path in (tmp_path / "tensorboard" / "t00001").iterdir()} == ended


def test_event_files_that_cannot_be_written_are_warned_of_once(tmp_path, record, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    tracker = TensorBoard(tmp_path, plan(), record.trials.values())
    tracker.show(record.trials["t00008"])
    tracker.close([])
    assert capsys.readouterr().err.count("track=tensorboard: NotADirectoryError") == 1


# ---- MLflow -----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes seconds to set up
    monkeypatch.setattr(track, "CLOSE_SECONDS", 600.0)
    for name in track.REQUEST:
        monkeypatch.delenv(name, raising=False)
    yield
    logging.getLogger("mlflow").setLevel(logging.WARNING)


def runs():
    """The parent and its children by trial."""
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = (found for found in client.search_experiments() if found.name == "finetune-search")
    everything = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in everything if "trial_id" not in run.data.tags)
    children = [run for run in everything if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(everything) - 1
    return client, parent, {run.data.tags["trial_id"]: run for run in children}


def history(client, run):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "val_loss")]


@pytest.mark.slow
def test_mlflow_has_a_parent_and_a_child_for_each_trial(store, record):
    tracker = MLflow(plan(), "id", [])
    for trial in record.trials.values():
        tracker.show(trial)
    tracker.close(record.trials.values())
    client, parent, children = runs()
    assert parent.info.run_name == "x" and parent.info.status == "KILLED" and parent.data.params["trials"] == "9"
    assert children.keys() == record.trials.keys()
    for trial in record.trials.values():
        child = children[trial.trial_id]
        assert sorted(history(client, child)) == sorted(losses(trial).items())
        assert child.data.params == {name: str(value) for name, value in trial.config.items()}
        tags = {name: child.data.tags[name] for name in ("status", "origin")}
        assert tags == {"status": trial.status, "origin": trial.origin}
        assert child.info.start_time == int(trial.started_at * 1000)
        states = {"running": "RUNNING", "failed": "FAILED"}
        assert child.info.status == states.get(trial.status, "FINISHED")
        if trial.status in FINAL:
            assert child.info.end_time == int(trial.ended_at * 1000)
            assert child.data.metrics["best_val_loss"] == best_epoch(trial.rows, "val_loss")["val_loss"]


def test_a_resumed_search_continues_the_same_runs_and_logs_nothing_twice(store, record):
    trial = record.trials["t00008"]
    trial.rows = trial.rows[:3]
    MLflow(plan(), "id", record.trials.values()).close(record.trials.values())
    _, parent, children = runs()
    before = losses(trial)
    trial.rows = [*trial.rows, Row(dict(trial.rows[-1]) | {"epoch": 4, "seq": 10_000})]
    again(trial, 2)
    trial.status, trial.reason, trial.ended_at = "completed", "all 4 epochs", 1.8e9
    tracker = MLflow(plan(), "id", record.trials.values())
    tracker.show(trial)
    tracker.close(record.trials.values())
    client, same, now = runs()
    assert same.info.run_id == parent.info.run_id and same.info.status == "FINISHED"
    assert {name: run.info.run_id for name, run in now.items()} == {n: run.info.run_id for n, run in children.items()}
    assert sorted(history(client, now["t00008"])) == sorted((before | {4: trial.rows[-1]["val_loss"]}).items())
    assert now["t00008"].info.status == "FINISHED" and now["t00008"].data.tags["reason"] == "all 4 epochs"


@pytest.fixture
def hanging():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("hangs", [False, True])
def test_a_server_that_is_down_or_hangs_delays_nothing(monkeypatch, store, record, hanging, capsys, hangs):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{hanging if hangs else 1}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(track, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(track, "CLOSE_SECONDS", 5.0)
    tracker = MLflow(plan(), "id", [])
    for trial in record.trials.values():
        tracker.show(trial)
    time.sleep(1.5)
    tracker.close(record.trials.values())
    tracker._thread.join()
    printed = capsys.readouterr().err
    assert printed.count("track=mlflow: MlflowException") == 1 and printed.count("--resume sends the rest") == 1
    assert len(printed.splitlines()) == 2


def test_a_server_that_comes_back_gets_everything_once(monkeypatch, store, record, tmp_path, capsys):
    monkeypatch.setattr(track, "RETRY_SECONDS", 0.05)
    (tmp_path / "mlruns").write_text("no folder")
    tracker = MLflow(plan(), "id", record.trials.values())
    while not tracker._warned:
        time.sleep(0.05)
    (tmp_path / "mlruns").unlink()
    tracker.close(record.trials.values())
    assert "track=mlflow: " in capsys.readouterr().err
    client, _, children = runs()
    for trial in record.trials.values():
        assert sorted(history(client, children[trial.trial_id])) == sorted(losses(trial).items())


def test_a_missing_package_is_an_error_before_any_trial(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match="MLflow is not installed; pip install mlflow"):
        check_installed("mlflow")
    check_installed("none")


def test_a_search_is_shown_and_tracked(tmp_path, record):
    shown = []
    trials = record.trials
    search = SimpleNamespace(plan=plan(track="tensorboard"), record=record, run_folder=tmp_path)
    search.show = lambda searching, trial: shown.append(trial.trial_id)
    with tracking(search, "id"):
        search.show(search, trials["t00008"])
    assert shown == ["t00008"] and len(list((tmp_path / "tensorboard").iterdir())) == 9
    search = SimpleNamespace(plan=plan(), record=record, run_folder=tmp_path / "none", show=print)
    with tracking(search, "id"):
        assert search.show is print
    assert not (tmp_path / "none").exists()


def test_mlflow_reports_to_nobody_else(store):
    MLflow(plan(), "id", []).close([])
    from mlflow.telemetry import get_telemetry_client

    assert get_telemetry_client() is None and os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
