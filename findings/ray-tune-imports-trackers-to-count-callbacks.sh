#!/usr/bin/env bash
# Library:  Ray Tune 2.60.0, with mlflow-skinny 3.17.2 beside it.
# Expected: a search with a callback of its own, and with usage statistics off, loads no experiment tracker.
# Happens:  for usage statistics Tune counts callbacks by their classes. To know those for MLflow and Weights & Biases, it
#           imports these packages, where they are installed, at the start of every search that has a callback; also if
#           statistics are off, so that nothing is counted.
# Seen:
#   without a callback, mlflow is loaded: False
#   with a callback, mlflow is loaded: True
# Matters:  loading MLflow took 1.1 s of processor time before the first trial, for nothing, and loaded its telemetry's code.
# Guard:    Tune's counting is replaced by nothing:
#           `tests/test_end_to_end.py::test_a_search_that_is_stopped_in_every_way_goes_on`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    'ray[tune]==2.60.0' mlflow-skinny==3.17.2 numpy==2.4.6

cd "$folder"
export RAY_USAGE_STATS_ENABLED=0 RAY_AIR_NEW_OUTPUT=0 MLFLOW_DISABLE_TELEMETRY=true
"$folder/venv/bin/python" -W ignore - <<'EOF' 2> "$folder/log.txt" || { tail -n 20 "$folder/log.txt"; exit 1; }
import os
import sys

import ray
from ray import tune


class Trial(tune.Trainable):
    def step(self):
        return {"done": True}

    def save_checkpoint(self, folder):
        pass


def loaded(callbacks):
    run_config = tune.RunConfig(storage_path=os.path.join(os.getcwd(), "results"), verbose=0, callbacks=callbacks)
    tune.Tuner(tune.with_resources(Trial, {"cpu": 1}), run_config=run_config).fit()
    return "mlflow" in sys.modules


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", _temp_dir=os.getcwd())
without, with_one = loaded([]), loaded([tune.Callback()])
print("without a callback, mlflow is loaded:", without)
print("with a callback, mlflow is loaded:", with_one)
ray.shutdown()
assert not without
assert with_one, "Tune loads no tracker now"
EOF
