"""Whole searches whose data and results lie in a storage, and on several nodes; commands as a user types them."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress

import pandas as pd
import pytest
import yaml
from ray.cluster_utils import Cluster
from shared import ONE_CORE
from test_end_to_end import SPACE, command, ended, outcome, stand_still

from tuning.record import storage
from tuning.record.journal import FINAL, PROMOTED, read_journal
from tuning.record.mirror import borrowed
from tuning.record.tables import read_table

pytestmark = pytest.mark.slow
SETTINGS = ("trials=8", "epochs=5", "finalists=0")


@pytest.fixture
def place(tmp_path, folder, bucket):
    """A folder with a space, and a bucket with the images."""
    space = SPACE | {"search": {"weights": "random", "reduction_factor": 3}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    for file in folder.rglob("*.png"):
        storage.write_bytes(f"{bucket}/films/{file.relative_to(folder)}", file.read_bytes())
    return tmp_path, bucket


def start(folder, *arguments, **environment):
    with open(folder / "log.txt", "a") as log:
        name, *rest = arguments
        options = {"cwd": folder, "stdout": log, "stderr": log, "env": os.environ | ONE_CORE | environment}
        return subprocess.Popen(command(name, *rest), **options)


def finish(process, folder):
    assert process.wait() == 0, (folder / "log.txt").read_text()


def wait_for(condition, process, seconds=240):
    """Until something holds, while the search runs."""
    for _ in range(10 * seconds):
        if condition():
            return
        assert process.poll() is None
        time.sleep(0.1)
    pytest.fail("it never came to this")


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_a_run_in_a_storage_killed_and_resumed_elsewhere_equals_one_here(place, folder):
    here, bucket = place
    common = ("--space", "space.yaml", "--set", *SETTINGS, "concurrent=1")
    finish(start(here, "run_search.py", *common, "--data", folder, "--name", "whole"), here)
    there = f"{bucket}/runs"
    arguments = (*common, "--data", f"{bucket}/films", "--storage", there, "--name", "whole")
    process = start(here, "run_search.py", *arguments, FINETUNE_SEARCH_CACHE=str(here / "one machine"))
    wait_for(lambda: len(storage.files_below(f"{there}/whole/journal")) >= 1, process)
    process.kill()
    process.wait()
    another = {"FINETUNE_SEARCH_CACHE": str(here / "another machine")}
    finish(start(here, "run_search.py", "--resume", "--name", "whole", "--storage", there, **another), here)
    with borrowed(f"{there}/whole") as run:
        for rows, expected in zip(outcome(run), outcome(here / "results" / "whole"), strict=True):
            pd.testing.assert_frame_equal(pd.DataFrame(rows), pd.DataFrame(expected), check_exact=True)
        files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    kept = {str(path.relative_to(here / "results" / "whole")) for path in (here / "results" / "whole").rglob("*.*")}
    lost = kept - files  # by the worker of the trial that had just ended: the kill may come before it has written them
    assert files <= kept and len(lost) <= 1 and all(name.startswith("predictions/") for name in lost)
    assert not (here / "results" / "s3:").exists()
    assert not list((here / "another machine" / "runs").iterdir())
    again = start(here, "run_search.py", *arguments)
    assert again.wait() == 2
    assert f"{there}/whole exists" in (here / "log.txt").read_text()

    finish(start(here, "train_final.py", f"{there}/whole", **another), here)
    finish(start(here, "report.py", f"{there}/whole", **another), here)
    assert {"whole/report.html", "whole/model/config.yaml"} <= storage.files_below(there).keys()


def trials_ended(runs):
    return sum(len(ended(journal)) for journal in runs.glob("*/three/journal.jsonl"))


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_three_nodes_of_which_one_dies_end_every_trial_once(place):
    here, bucket = place
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes = [
            cluster.add_node(num_cpus=1, env_vars={"FINETUNE_SEARCH_CACHE": str(here / f"node {number}")})
            for number in range(2)
        ]
        there = f"{bucket}/runs"
        settings = ("trials=8", "epochs=6", "finalists=0", "early_stopping=true")
        arguments = ("--space", "space.yaml", "--data", f"{bucket}/films", "--storage", there, "--name", "three")
        process = start(
            here,
            "run_search.py",
            *arguments,
            "--set",
            *settings,
            RAY_ADDRESS=cluster.address,
            FINETUNE_SEARCH_CACHE=str(here / "driver"),
        )
        wait_for(lambda: trials_ended(here / "driver" / "runs") >= 2, process)
        cluster.remove_node(nodes[0], allow_graceful=False)
        finish(process, here)
    finally:
        cluster.shutdown()
    with borrowed(f"{there}/three") as run:
        trials = read_table(run / "trials.parquet")
        events = read_journal(run / "journal.jsonl")
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        predictions = {path.stem for path in (run / "predictions").iterdir()}
    searched = trials[trials["number"].notna()]
    assert sorted(searched["number"]) == list(range(8))
    assert set(trials["status"]) <= set(FINAL)
    ends = Counter(event["trial_id"] for event in events if event["event"] == "ended")
    ends -= Counter(event["trial_id"] for event in events if event.get("verdict") == PROMOTED)
    assert ends == Counter(trials["trial_id"])
    finite = searched[searched["val_loss"].notna()]
    # A node may die before it has written what its last trials leave; nothing else is missing, or too much.
    assert len(set(finite["trial_id"]) - predictions) <= 2
    assert len(left) <= 5
    assert set(left) <= {f"{trial_id}.best.safetensors" for trial_id in finite["trial_id"]}
    assert any((here / f"node {number}" / "runs").exists() for number in range(2))  # trials did run there


class Way:
    """A way to a server on this machine that can be cut: connections break, and none is taken until it is mended."""

    def __init__(self, port):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._to, self._lock = port, threading.Lock()
        self.mend()

    def mend(self):
        self._open = [socket.create_server(("127.0.0.1", self.port))]
        threading.Thread(target=self._take, args=(self._open[0],), daemon=True).start()

    def cut(self):
        with self._lock:
            for end in self._open:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def _take(self, server):
        with suppress(OSError):
            while True:
                pair = [server.accept()[0], socket.create_connection(("127.0.0.1", self._to))]
                with self._lock:
                    if server.fileno() < 0:  # it was cut meanwhile
                        return [end.close() for end in pair]
                    self._open += pair
                for ends in (pair, pair[::-1]):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source, target):
        with suppress(OSError):
            while content := source.recv(65536):
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_a_storage_that_is_cut_off_for_a_while_has_the_whole_run_at_the_end(place, s3, monkeypatch):
    here, bucket = place
    way = Way(int(s3.rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{way.port}")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1, env_vars={"FINETUNE_SEARCH_CACHE": str(here / "node")})
        there = f"{bucket}/runs"
        settings = ("trials=12", "epochs=6", "finalists=0", "early_stopping=false")
        arguments = ("--space", "space.yaml", "--data", f"{bucket}/films", "--storage", there, "--name", "three")
        named = {"RAY_ADDRESS": cluster.address, "FINETUNE_SEARCH_CACHE": str(here / "driver")}
        process = start(here, "run_search.py", *arguments, "--set", *settings, **named)
        wait_for(lambda: trials_ended(here / "driver" / "runs") >= 2, process)
        stand_still(process)
        way.cut()
        cut_at = trials_ended(here / "driver" / "runs")
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: "the storage fails" in (here / "log.txt").read_text(), process)
        wait_for(lambda: trials_ended(here / "driver" / "runs") >= cut_at + 2, process)
        way.mend()
        finish(process, here)
    finally:
        cluster.shutdown()
    assert "the storage works again" in (here / "log.txt").read_text()
    with borrowed(f"{there}/three") as run:
        trials = read_table(run / "trials.parquet")
        left = {path.name for path in (run / "checkpoints").iterdir()}
        predictions = {path.stem for path in (run / "predictions").iterdir()}
    assert list(trials["status"]) == ["completed"] * 12
    assert predictions == set(trials["trial_id"])
    best = trials.sort_values("val_tempered_loss")["trial_id"][:5]
    assert left == {f"{trial_id}.best.safetensors" for trial_id in best}
    assert any((here / "node" / "runs").iterdir())  # trials did run there


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_a_node_that_does_not_reach_the_storage_is_found_before_the_first_trial(place):
    here, bucket = place
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1, env_vars={"AWS_ENDPOINT_URL": "http://127.0.0.1:1"})
        arguments = ("--space", "space.yaml", "--storage", f"{bucket}/runs", "--name", "three")
        process = start(here, "run_search.py", *arguments, RAY_ADDRESS=cluster.address)
        assert process.wait() == 2
    finally:
        cluster.shutdown()
    [told] = [line for line in (here / "log.txt").read_text().splitlines() if line.startswith("error: ")]
    assert f"({node.node_id[:8]}): " in told and told.endswith("that all nodes reach, and each node its keys")
    assert not storage.files_below(f"{bucket}/runs")
