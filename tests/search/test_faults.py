"""Searches whose workers, nodes and drivers are killed: real processes, real signals."""

import os
import random
import signal
import subprocess
import time
from collections import Counter, deque
from contextlib import contextmanager, suppress

import pytest
import ray
import torch
import yaml
from ray.cluster_utils import Cluster
from searches import FreeTrial, OnAGpu, SlowTrial, make_run, workers
from shared import SOAK, shared_ray
from test_end_to_end import SPACE, command

from tuning import run_search
from tuning.record.journal import FINAL, read_journal, read_record
from tuning.record.tables import read_table, read_whole
from tuning.search.cluster import Slots, ray_nodes, ray_running, restored_environment
from tuning.search.driver import FAILURES_AT_FIRST, LOST_ACTOR_RETRIES, LOST_STARTS
from tuning.settings.config import InputError, SearchPlan

pytestmark = pytest.mark.slow
HUNDRED = {"worker": 60, "node": 25, "driver": 15}
KILLS = 100 if SOAK else 4  # all of the hundred take half an hour
NODES, TRIALS, EPOCHS = 2, 12, 8


@pytest.fixture
def ray_started():
    shared_ray()


def test_a_trial_that_is_given_a_dead_worker_goes_on_with_another(tmp_path, folder, ray_started):
    """Ray keeps an ended trial's worker for the next trial, and doesn't look whether it still lives."""
    run = tmp_path / "run"
    search = make_run(run, folder, trials=2, epochs=2, early_stopping=False)(trainable=FreeTrial)
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
    assert "died" in losses[0]["error"] or "unavailable" in losses[0]["error"]  # where news of a death are late


def test_a_trial_that_hangs_is_ended_and_its_slot_goes_on(tmp_path, folder, ray_started):
    run = tmp_path / "run"
    make = make_run(run, folder, trials=2, epochs=3, early_stopping=False)
    search = make(trainable=FreeTrial)
    stopped = []

    def stop(search, trial):
        if trial.status == "running" and not stopped:
            stopped.extend(workers())
            os.kill(*stopped, signal.SIGSTOP)
        timeout = 5.0 if trial.trial_id == "t00000" and not trial.ended else None  # the other trial may be slow
        search.plan = search.plan.model_copy(update={"trial_timeout": timeout})

    search.show = stop
    assert search.run()
    trials = read_table(run / "trials.parquet")
    assert list(trials["status"]) == ["failed", "completed"] and list(trials["epochs"]) == [1, 3]
    assert trials["reason"][0] == "reported nothing for 5 s (trial_timeout)"
    while os.path.exists(f"/proc/{stopped[0]}"):  # it can't hear that it is to go, so Ray kills it
        time.sleep(0.1)


def test_a_trial_whose_workers_ray_kills_for_memory_is_out_of_memory(tmp_path, folder, monkeypatch, no_ray):
    """The machine counts as full from the start, so Ray's memory monitor kills every worker when it looks."""
    monkeypatch.setenv("RAY_preload_python_modules", "")
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "15000")  # long enough for the trial to have begun
    monkeypatch.setattr("tuning.search.driver.LOST_ACTOR_RETRIES", 0)
    with ray_running(SearchPlan(name="test")) as resources:
        resources()
        run = tmp_path / "run"
        assert make_run(run, folder, trials=1, epochs=10_000, early_stopping=False)(trainable=SlowTrial).run()
    (trial,) = read_table(run / "trials.parquet").to_dict("records")
    assert trial["status"] == "out_of_memory" and "low on memory" in trial["reason"]


@pytest.fixture
def two_gpus(no_ray):
    """A Ray that believes in two GPUs."""
    with restored_environment():
        os.environ["RAY_preload_python_modules"] = ""
        ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
        yield Slots(1, 1.0, 2)
    ray.shutdown()


def test_a_gpu_that_does_not_work_gets_one_trial_which_another_then_trains(tmp_path, folder, two_gpus, capsys):
    search = make_run(tmp_path / "run", folder, trials=30, early_stopping=False)(2, trainable=OnAGpu)
    search.resources = two_gpus
    assert search.run()
    trials = read_table(tmp_path / "run" / "trials.parquet")
    assert len(trials) == 30 and set(trials["status"]) == {"completed"}
    told = [line for line in capsys.readouterr().err.splitlines() if "it gets no more trials" in line]
    assert len(told) == 1 and told[0].startswith("GPU 1 of here: CUDA error")


def test_a_slot_whose_first_trials_all_fail_gets_no_more(tmp_path, folder, two_gpus, capsys):
    """As on a node that can't read a file: trials that fail at once would be given to it, one after another."""
    search = make_run(tmp_path / "one-fails", folder, trials=30, early_stopping=False)(2, trainable=OnAGpu)
    search.resources = two_gpus
    assert search.run() and search.halted is None
    statuses = Counter(read_table(tmp_path / "one-fails" / "trials.parquet")["status"])
    assert statuses == {"completed": 30 - FAILURES_AT_FIRST, "failed": FAILURES_AT_FIRST}
    told = capsys.readouterr().err
    assert f"the first {FAILURES_AT_FIRST} trials of a worker on " in told and "it gets no more trials" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_gpus_that_torch_cannot_use_are_told_before_a_run_begins(tmp_path, folder, two_gpus, monkeypatch):
    """Ray counts two, but there is no driver."""

    @contextmanager
    def running(plan):
        yield ray_nodes

    monkeypatch.setattr("tuning.search.cluster.ray_running", running)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    with pytest.raises(InputError) as raised:
        run_search.run(run_search.Flags(data=str(folder), space="space.yaml", name="run"))
    assert "which can't be used: RuntimeError: Found no NVIDIA driver" in raised.value.faults[0]
    assert raised.value.faults[-1].startswith("no GPU works; install a build of torch for this driver")
    assert not (tmp_path / "results" / "run").exists()


def test_where_no_gpu_works_the_search_ends_and_says_so(tmp_path, folder, two_gpus):
    search = make_run(tmp_path / "none-works", folder, trials=30)(2, trainable=OnAGpu)
    search.resources = two_gpus
    assert search.run()
    assert search.halted.startswith("no GPU works; the last one: GPU ")
    assert set(read_table(tmp_path / "none-works" / "trials.parquet")["status"]) == {"interrupted"}


@pytest.fixture
def cluster(no_ray):
    """A Ray of a node for the driver alone and others, each with a core, that may be killed."""
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(NODES):
        started.add_node(num_cpus=1)
    yield started
    started.shutdown()


def drive(place, cluster, *arguments):
    with open(place / "log.txt", "a") as log:
        environment = os.environ | {"RAY_ADDRESS": cluster.address}
        return subprocess.Popen(
            command("run_search.py", *arguments), cwd=place, stdout=log, stderr=log, env=environment
        )


def wait_for_an_epoch(journal, driver):
    """False where the search ends before."""
    known = epochs(journal)
    while epochs(journal) == known:
        if driver.poll() is not None:
            return False
        time.sleep(0.05)
    return True


def epochs(journal):
    return sum(event["event"] == "epoch" for event in read_journal(journal)) if journal.exists() else 0


def search_with_kills(place, name, cluster, arguments, kills, rng):
    """Takes kills from the queue until the search ends; returns the journal as it was after each of the driver."""
    journal, journals, begun = place / "results" / name / "journal.jsonl", [], False
    driver = drive(place, cluster, *arguments, "--name", name)
    while kills and driver.poll() is None:
        # Half of the kills come upon the one before, so that workers are also lost as they start.
        if (not begun or kills[0] == "driver" or rng.random() < 0.5) and not wait_for_an_epoch(journal, driver):
            break
        begun = kills[0] != "driver"
        time.sleep(rng.uniform(0, 2))
        if kills[0] == "driver":
            driver.kill()
            driver.wait()
            journals.append(journal.read_bytes())
            driver = drive(place, cluster, "--resume", "--name", name)
        elif kills[0] == "node":
            cluster.remove_node(rng.choice(sorted(cluster.worker_nodes, key=id)), allow_graceful=False)
            cluster.add_node(num_cpus=1)
        elif living := workers():
            with suppress(ProcessLookupError):
                os.kill(rng.choice(sorted(living)), signal.SIGKILL)
        else:
            continue
        kills.popleft()
    assert driver.wait() == 0, (place / "log.txt").read_text()[-3000:]
    return journals


def test_a_node_that_joins_is_given_trials(tmp_path, folder, cluster):
    cluster.remove_node(next(iter(cluster.worker_nodes)))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE | {"search": {"weights": "random", "finalists": 0}}))
    arguments = ["--space", "space.yaml", "--data", folder, "--name", "run", "--trials", "24", "--epochs", "20"]
    driver = drive(tmp_path, cluster, *arguments, "--concurrent", "2", "--no-early-stopping")
    assert wait_for_an_epoch(tmp_path / "results" / "run" / "journal.jsonl", driver)
    cluster.add_node(num_cpus=1)
    assert driver.wait() == 0
    trials = read_table(tmp_path / "results" / "run" / "trials.parquet")
    assert set(trials["status"]) == {"completed"}
    running = [((trials["started_at"] <= at) & (trials["ended_at"] > at)).sum() for at in trials["started_at"]]
    assert max(running) == 2  # although trials end while the new node's worker starts
    assert "up to 2 concurrent trials" in (tmp_path / "log.txt").read_text()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_random_kills_lose_and_repeat_nothing(tmp_path, folder, cluster):
    rng = random.Random(0)
    kills = [kind for kind, count in HUNDRED.items() for _ in range(count)]
    rng.shuffle(kills)
    kills = deque(kills[:KILLS])
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE | {"search": {"weights": "random"}}))
    settings = {"trials": TRIALS, "epochs": EPOCHS, "probe": "false", "finalists": 0}
    arguments = ["--space", "space.yaml", "--data", folder]
    arguments += ["--set", *(f"{key}={value}" for key, value in settings.items())]
    for number in range(KILLS):
        if not kills:
            break
        left, began = Counter(kills), time.monotonic()
        journals = search_with_kills(tmp_path, f"run{number}", cluster, arguments, kills, rng)
        print(f"search {number}: {dict(left - Counter(kills))}, {time.monotonic() - began:.0f} s")
        check(tmp_path / "results" / f"run{number}", journals)
    assert not kills


def check(run, journals):
    """Every trial has ended once, for good; no row is twice, no file torn or left over."""
    journal = (run / "journal.jsonl").read_bytes()
    for earlier in journals:
        assert journal.startswith(earlier[: earlier.rfind(b"\n") + 1])
    ended = Counter()
    for event in read_journal(run / "journal.jsonl"):
        ended[event["trial_id"]] -= event.get("verdict") == "promoted"
        assert not ended[event["trial_id"]]  # nothing is told of a trial that has ended, unless it is promoted
        ended[event["trial_id"]] += event["event"] == "ended" and event["status"] in FINAL
    assert ended == Counter({f"t{number:05d}": 1 for number in range(TRIALS)})
    trials, rows = read_table(run / "trials.parquet"), read_table(run / "epochs.parquet")
    assert sorted(trials["number"]) == list(range(TRIALS)) and trials["status"].isin(FINAL).all()
    assert not rows.duplicated(["trial_id", "epoch"]).any()
    counted = rows.groupby("trial_id").size()
    assert counted.reindex(trials["trial_id"], fill_value=0).tolist() == trials["epochs"].tolist()
    for trial in read_record(run / "journal.jsonl").trials.values():
        given_up = trial.losses > LOST_ACTOR_RETRIES or trial.lost_starts > LOST_STARTS
        assert (trial.status == "failed") == given_up, trial.error
    for path in run.rglob("*.parquet"):
        read_whole(path)
    assert not [path for path in run.rglob(".*") if path.is_file()]
