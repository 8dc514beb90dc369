#!/usr/bin/env bash
# Library:  Ray Tune 2.60.0, TrialScheduler.on_trial_result, with a class trainable.
# Expected: a scheduler sees every row that a trial reports, as it was reported.
# Happens:  the row with done=True goes to on_trial_complete alone, so a scheduler that records rows in on_trial_result
#           loses the last epoch of each trial. Ray replaces trial_id and pid by values of its own and drops config.
# Seen:
#   epochs that the trial reported: 1 to 3
#   epochs that on_trial_result saw: [1, 2]; on_trial_complete saw: 3
#   of trial_id, pid and config, as the trial reported them, on_trial_result saw: []
# Matters:  this project's scheduler writes the journal, from which all tables are made, and its trials keep their ids
#           over restarts.
# Guard:    no row is reported as done (the trial's end is a value in it), and ids travel in the trial's configuration:
#           `tests/search/test_driver.py::test_every_trial_is_there_once_with_a_reason`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'ray[tune]==2.60.0' numpy==2.4.6

cd "$folder"
export RAY_USAGE_STATS_ENABLED=0 RAY_AIR_NEW_OUTPUT=0
"$folder/venv/bin/python" -W ignore - <<'EOF' 2> "$folder/log.txt" || { tail -n 20 "$folder/log.txt"; exit 1; }
import os

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler


class Trial(tune.Trainable):
    def setup(self, config):
        self.epoch = 0

    def step(self):
        self.epoch += 1
        return {"epoch": self.epoch, "trial_id": "t00001", "pid": "mine", "config": "mine", "done": self.epoch == 3}

    def save_checkpoint(self, folder):
        pass


class Recorder(FIFOScheduler):
    """Records the rows that it is shown."""

    def __init__(self):
        super().__init__()
        self.rows, self.last = [], None

    def on_trial_result(self, controller, trial, result):
        self.rows.append(dict(result))
        return super().on_trial_result(controller, trial, result)

    def on_trial_complete(self, controller, trial, result):
        self.last = result["epoch"]
        super().on_trial_complete(controller, trial, result)


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", _temp_dir=os.getcwd())
recorder = Recorder()
(result,) = tune.Tuner(
    Trial,
    tune_config=tune.TuneConfig(metric="epoch", mode="max", scheduler=recorder),
    run_config=tune.RunConfig(storage_path=os.path.join(os.getcwd(), "results"), verbose=0),
).fit()
seen = [row["epoch"] for row in recorder.rows]
print(f"epochs that the trial reported: 1 to {result.metrics['epoch']}")
print(f"epochs that on_trial_result saw: {seen}; on_trial_complete saw: {recorder.last}")
kept = [key for key in ("trial_id", "pid", "config") if recorder.rows[0].get(key) in ("t00001", "mine")]
print(f"of trial_id, pid and config, as the trial reported them, on_trial_result saw: {kept}")
ray.shutdown()
assert seen == [1, 2] and recorder.last == 3, "the row with done=True is shown to on_trial_result now"
assert not kept, "reported ids are kept now"
EOF
