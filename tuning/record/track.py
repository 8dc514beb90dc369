"""Tracking of a search in MLflow or TensorBoard, from what has been journalled; nothing is read back from them.

Each tracker has `show`, called with a trial that has reported or ended, and `close`. If it fails, the search continues.
"""

import importlib.util
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning.record.journal import Trial, best_epoch
from tuning.record.tables import EPOCHS
from tuning.settings.config import InputError, SearchPlan, without_secrets

COLUMNS = [name for name in EPOCHS.names if name not in ("seq", "trial_id", "epoch")]
RETRY_SECONDS = 60.0  # after a failure
CLOSE_SECONDS = 10.0  # that the end of a search waits for MLflow, at most
REQUEST = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # MLflow's own: 120 s, 7 times
ENDS = {"running": "RUNNING", "failed": "FAILED", "interrupted": "KILLED"}  # MLflow's statuses; else FINISHED
BATCH_ROWS = 30  # MLflow takes 1,000 metrics at once
LONGEST = 5000  # characters of a tag


def check_installed(track: str) -> None:
    """Check that the package for a kind of tracking is installed.

    Raises:
        InputError: it is not.
    """
    if track == "mlflow" and importlib.util.find_spec("mlflow") is None:
        cure = "pip install mlflow, or mlflow-skinny, which has no web page"
        raise InputError(f"--set track=mlflow: MLflow is not installed; {cure}")


@contextmanager
def tracking(search: Any, run_id: str) -> Iterator[None]:
    """Track a `Search` as its plan asks for while the block runs; `run_id` names its run, the same at each start."""
    plan, trials, show = search.plan, search.record.trials, search.show
    if plan.track == "none":
        yield
        return
    before = [trial for trial in trials.values() if trial.started_at is not None]
    tracker = MLflow(plan, run_id, before) if plan.track == "mlflow" else TensorBoard(search.run_folder, plan, before)

    def both(searching: Any, trial: Trial) -> None:
        show(searching, trial)
        tracker.show(trial)

    search.show = both
    try:
        yield
    finally:
        tracker.close([trial for trial in trials.values() if trial.started_at is not None])


def values(trial: Trial, row: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Return what is logged of an epoch: its columns in the table that have a value, and the best metric until then."""
    best = best_epoch((other for other in trial.rows if other["epoch"] <= row["epoch"]), metric)
    logged = {name: float(row[name]) for name in COLUMNS if row.get(name) is not None}
    return logged if best is None else logged | {f"best_{metric}": float(best[metric])}


def _warn(track: str, error: Exception, consequence: str) -> None:
    message = without_secrets(" ".join(str(error).split()))[:200]
    print(f"track={track}: {type(error).__name__}: {message}; the search continues {consequence}", file=sys.stderr)


# ---- TensorBoard ------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in the run's folder `tensorboard/<trial_id>/`, written at once, without a thread that could die.

    A trial that is resumed gets a second file, which begins by voiding the first one's epochs.
    """

    def __init__(self, run: Path, plan: SearchPlan, trials: Iterable[Trial]):
        self._folder, self._metric = run / "tensorboard", plan.metric
        self._files: dict[str, Any] = {}
        self._last: dict[str, tuple[float, float]] = {}  # seq and epoch of the last row written
        self._failed = False
        for trial in trials:
            if not self._complete(trial):
                self.show(trial)

    def _complete(self, trial: Trial) -> bool:
        """Return whether the trial's end has been written: nothing is written after it."""
        written = [path.stat().st_mtime for path in (self._folder / trial.trial_id).glob("events.*")]
        return trial.ended and trial.ended_at is not None and max(written, default=0.0) >= trial.ended_at

    def show(self, trial: Trial) -> None:
        if self._failed:
            return
        try:
            self._write(trial)
        except OSError as error:
            self._failed = True
            _warn("tensorboard", error, "without more event files")

    def _write(self, trial: Trial) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import hparams

        _, begin, end = hparams({"origin": trial.origin, **trial.config}, {})
        if trial.trial_id not in self._files:
            folder = self._folder / trial.trial_id
            resumed = folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            self._files[trial.trial_id] = EventsWriter(str(folder / "events"))
            self._last[trial.trial_id] = -math.inf, math.inf if resumed else -math.inf
            self._files[trial.trial_id].write_event(Event(wall_time=trial.started_at, summary=begin))
        file = self._files[trial.trial_id]
        seq, epoch = self._last[trial.trial_id]
        for row in [row for row in trial.rows if row["seq"] > seq]:
            if row["epoch"] <= epoch:  # voids the epochs from here on that an earlier file, or a dead worker, wrote
                start = SessionLog(status=SessionLog.START)
                file.write_event(Event(wall_time=row["time"], step=row["epoch"], session_log=start))
            logged = values(trial, row, self._metric)
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in logged.items()])
            file.write_event(Event(wall_time=row["time"], step=row["epoch"], summary=summary))
            seq, epoch = row["seq"], row["epoch"]
        self._last[trial.trial_id] = seq, epoch
        file.flush()
        if trial.ended:
            file.write_event(Event(wall_time=trial.ended_at, summary=end))
            self._files.pop(trial.trial_id).close()
            del self._last[trial.trial_id]

    def close(self, trials: Iterable[Trial]) -> None:
        """Close the files; all that the trials have reported is in them."""
        for file in self._files.values():
            with suppress(OSError):  # warned of when it failed
                file.close()


# ---- MLflow -----------------------------------------------------------------------------------------------------


@dataclass
class _Child:
    run_id: str
    epochs: int = 0  # that MLflow has
    status: str = "running"  # as MLflow has it
    configured: bool = False  # whether MLflow has the configuration


class MLflow:
    """A parent run, and a child run for each trial, in the server or store that MLflow's own variables name.

    A thread sends them, so that a server that is down or hangs delays nothing. It warns once and retries each minute:
    then it reads from the server what is there, and sends only the rest. So a search that is resumed continues the same
    runs, and an epoch that was voided and run again keeps its first values there.
    """

    def __init__(self, plan: SearchPlan, run_id: str, trials: Iterable[Trial]):
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # else two lines for each trial
        for name, value in REQUEST.items():
            os.environ.setdefault(name, value)
        self._plan, self._run_id = plan, run_id
        self._due = {trial.trial_id: trial for trial in trials}
        self._client: Any = None
        self._parent, self._experiment = "", ""
        self._children: dict[str, _Child] = {}
        self._warned = self._finished = self._complete = False
        self._wake, self._closing = threading.Event(), threading.Event()
        self._wake.set()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def show(self, trial: Trial) -> None:
        self._due[trial.trial_id] = trial
        self._wake.set()

    def close(self, trials: Iterable[Trial]) -> None:
        """Send the rest of these trials, but wait at most for `CLOSE_SECONDS`."""
        trials = list(trials)
        self._finished = sum(trial.ended and trial.number is not None for trial in trials) >= self._plan.trials
        self._due.update({trial.trial_id: trial for trial in trials})  # interrupted ones have not been shown
        self._closing.set()
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if not self._complete:
            print("track=mlflow: not all of the search was sent; --resume sends the rest", file=sys.stderr)

    def _work(self) -> None:
        while not self._complete:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self._send_due()
                if closing:
                    self._client.set_terminated(self._parent, "FINISHED" if self._finished else "KILLED")
                    self._complete = True
            except Exception as error:  # of any store or server
                self._client = None
                if not self._warned:
                    _warn("mlflow", error, f"and retries MLflow every {RETRY_SECONDS:.0f} s")
                self._warned = True
                if closing:
                    return
                self._closing.wait(RETRY_SECONDS)
                self._wake.set()

    def _send_due(self) -> None:
        if self._client is None:
            self._connect()
        for trial_id in list(self._due):
            trial = self._due.pop(trial_id)  # before it is read: what it reports meanwhile makes it due again
            try:
                self._send(trial)
            except Exception:
                self._due.setdefault(trial_id, trial)
                raise

    def _connect(self) -> None:
        """Find the runs of an earlier start, or of before a failure; else create the parent."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mlflow
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        client = mlflow.MlflowClient()
        self._experiment = _experiment(client)
        found = client.search_runs([self._experiment], f"tags.search_id = '{self._run_id}'")
        tags = {"search_id": self._run_id}
        parent = found[0] if found else client.create_run(self._experiment, run_name=self._plan.name, tags=tags)
        self._parent = parent.info.run_id
        client.update_run(self._parent, status="RUNNING")
        if not parent.data.params:  # a failure may have come between the run and its settings
            mlflow.log_params(self._plan.model_dump(exclude_none=True), run_id=self._parent)
        self._children, token = {}, None
        while token != "":
            children = f"tags.`mlflow.parentRunId` = '{self._parent}'"
            page = client.search_runs([self._experiment], children, page_token=token)
            for run in page:
                tags, epochs = run.data.tags, int(run.data.metrics.get("epoch", 0))
                child = _Child(run.info.run_id, epochs, tags["status"], configured=bool(run.data.params))
                self._children[tags["trial_id"]] = child
            token = page.token or ""
        self._client = client

    def _send(self, trial: Trial) -> None:
        import mlflow
        from mlflow.entities import Metric, RunTag

        status, rows = trial.status or "running", list(trial.rows)  # in this order: an end has all its rows
        child = self._children.get(trial.trial_id) or self._create_child(trial)
        if not child.configured:
            mlflow.log_params(trial.config, run_id=child.run_id)
            child.configured = True
        rows = [row for row in rows if row["epoch"] > child.epochs]
        for first in range(0, len(rows), BATCH_ROWS):
            part = rows[first : first + BATCH_ROWS]
            metrics = [
                Metric(name, value, int(row["time"] * 1000), row["epoch"])
                for row in part
                for name, value in (values(trial, row, self._plan.metric) | {"epoch": row["epoch"]}).items()
            ]
            self._client.log_batch(child.run_id, metrics=metrics)
            child.epochs = part[-1]["epoch"]
        if status != child.status:
            tags = [RunTag("status", status), RunTag("reason", (trial.reason or "")[:LONGEST])]
            self._client.log_batch(child.run_id, tags=tags)
            if status == "running":
                self._client.update_run(child.run_id, status="RUNNING")
            else:
                end = None if trial.ended_at is None else int(trial.ended_at * 1000)
                self._client.set_terminated(child.run_id, ENDS.get(status, "FINISHED"), end)
            child.status = status

    def _create_child(self, trial: Trial) -> _Child:
        assert trial.started_at is not None
        tags = {"mlflow.parentRunId": self._parent, "trial_id": trial.trial_id, "origin": trial.origin}
        tags |= {"status": "running"} | ({"finalist_of": trial.finalist_of} if trial.finalist_of else {})
        start = int(trial.started_at * 1000)
        run = self._client.create_run(self._experiment, start_time=start, tags=tags, run_name=trial.trial_id)
        child = self._children[trial.trial_id] = _Child(run.info.run_id)
        return child


def _experiment(client: Any) -> str:
    """Return the id of the experiment that MLflow's variables name, else of `finetune-search`."""
    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "finetune-search")
    there = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if there is None else there.experiment_id)
