#!/usr/bin/env bash
# Library:  Ray Tune 2.60.0.
# Expected: Ray starts a worker process on each core ahead of need, and a trial runs in one of them.
# Happens:  an actor does, a trial never. Tune gives the actors of its trials environment variables of their own (at least
#           PL_DISABLE_FORK=1), which only a new process can have. The workers that wait, and whatever they have loaded
#           ahead (RAY_preload_python_modules), are of no use to a search.
# Seen:
#   workers that wait: 2
#   an actor runs in one of them: True
#   a trial runs in one of them: False
# Matters:  the first trials wait for new workers to load torch, about 5 s on two cores.
# Guard:    the remote class of trials is made without them where the workers inherit the driver's environment:
#           `tests/search/test_cluster.py::test_trials_run_in_the_workers_that_have_loaded_torch`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    'ray[tune]==2.60.0' numpy==2.4.6 psutil==7.2.2

cd "$folder"
export RAY_USAGE_STATS_ENABLED=0 RAY_AIR_NEW_OUTPUT=0
"$folder/venv/bin/python" -W ignore - <<'EOF' 2> "$folder/log.txt" || { tail -n 20 "$folder/log.txt"; exit 1; }
import os
import time

import psutil
import ray
from ray import tune


class Actor:
    def process(self):
        return os.getpid()


class Trial(tune.Trainable):
    def step(self):
        return {"process": os.getpid(), "done": True}

    def save_checkpoint(self, folder):
        pass


def waiting():
    titles = {process.pid: process.cmdline() for process in psutil.Process().children(recursive=True)}
    return {number for number, title in titles.items() if title and title[0].startswith("ray::IDLE")}


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", _temp_dir=os.getcwd())
while len(ahead := waiting()) < 2:
    time.sleep(0.1)
print("workers that wait:", len(ahead))
actor = ray.remote(num_cpus=1)(Actor).remote()
of_actor = ray.get(actor.process.remote())
print("an actor runs in one of them:", of_actor in ahead)
run_config = tune.RunConfig(storage_path=os.path.join(os.getcwd(), "results"), verbose=0)
(result,) = tune.Tuner(tune.with_resources(Trial, {"cpu": 1}), run_config=run_config).fit()
of_trial = result.metrics["process"]
print("a trial runs in one of them:", of_trial in ahead)
ray.shutdown()
assert of_actor in ahead
assert of_trial not in ahead, "trials run in the workers that wait now"
EOF
