#!/usr/bin/env bash
# Library:  Ray 2.60.0.
# Expected: a worker process that has ended a task, and waits, may become an actor's, as one that has run nothing may.
# Happens:  it never does. An actor takes a worker that has run nothing, or starts a new process, while the one that has run
#           a task stays idle, however long it has waited. What the task has loaded is of use to other tasks alone.
# Seen:
#   first actor in the worker that has run nothing: True
#   second actor in the worker that has run a task: False
# Matters:  a task that checks backbones in a worker that has loaded torch costs the trial that would have run in it 5 s, for a
#           new worker that loads it again.
# Guard:    workers check backbones as they load, before they take any work (`tuning/search/preloaded.py`):
#           `tests/search/test_cluster.py::test_trials_run_in_the_workers_that_have_loaded_torch`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check ray==2.60.0 psutil==7.2.2

cd "$folder"
export RAY_USAGE_STATS_ENABLED=0
"$folder/venv/bin/python" -W ignore - <<'EOF' 2> "$folder/log.txt" || { tail -n 20 "$folder/log.txt"; exit 1; }
import os
import time

import psutil
import ray


class Actor:
    def process(self):
        return os.getpid()


def task():
    return os.getpid()


def waiting():
    titles = {process.pid: process.cmdline() for process in psutil.Process().children(recursive=True)}
    return {number for number, title in titles.items() if title and title[0].startswith("ray::IDLE")}


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", _temp_dir=os.getcwd())
while len(ahead := waiting()) < 2:
    time.sleep(0.1)
of_task = ray.get(ray.remote(num_cpus=1)(task).remote())
assert of_task in ahead
time.sleep(3)  # a worker stays reserved for half a second after a task
assert of_task in waiting()
actors = [ray.remote(num_cpus=1)(Actor).remote() for _ in range(2)]
processes = {ray.get(actor.process.remote()) for actor in actors}
print("first actor in the worker that has run nothing:", bool(processes & (ahead - {of_task})))
print("second actor in the worker that has run a task:", of_task in processes)
ray.shutdown()
assert processes & (ahead - {of_task})
assert of_task not in processes, "actors run in workers that have run a task now"
EOF
