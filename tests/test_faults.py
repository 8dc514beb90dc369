"""Searches whose workers, nodes and drivers are killed: real processes, real signals."""

import os
import signal

import pytest
from test_search import make_run, workers

from tuning.cluster import ray_running
from tuning.config import SearchPlan
from tuning.tables import read_journal, read_table

pytestmark = pytest.mark.slow


@pytest.fixture
def ray_started():
    with ray_running(SearchPlan(name="test")) as resources:
        resources()
        yield


def test_a_trial_that_is_given_a_dead_worker_goes_on_with_another(tmp_path, folder, ray_started):
    """Ray keeps an ended trial's worker for the next trial, and doesn't look whether it still lives."""
    run = tmp_path / "run"
    search = make_run(run, folder, trials=2, epochs=2, early_stopping=False)()
    killed = []

    def kill(search, trial):
        if trial.ended and not killed:
            killed.extend(workers())
            os.kill(*killed, signal.SIGKILL)

    search.show = kill
    assert search.run()
    trials = read_table(run / "trials.parquet")
    assert len(killed) == 1
    assert list(trials["status"]) == ["completed", "completed"] and list(trials["epochs"]) == [2, 2]
    losses = [event for event in read_journal(run / "journal.jsonl") if event["event"] == "lost"]
    assert [(event["trial_id"], event["started"]) for event in losses] == [("t00001", False)]
