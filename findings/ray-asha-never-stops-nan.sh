#!/usr/bin/env bash
# Library:  Ray Tune 2.60.0, ASHAScheduler.
# Expected: a trial whose loss is NaN is the worst of its rung, and is stopped.
# Happens:  it is never stopped, because a comparison with NaN is false. Trials without a finite loss train for all
#           epochs, while trials that do learn are stopped beside them.
# Seen:
#   trial 0: last loss    nan, trained for 16 of 16 epochs
#   trial 1: last loss  1.062, trained for 16 of 16 epochs
#   trial 2: last loss    nan, trained for 16 of 16 epochs
#   trial 3: last loss  4.000, trained for  1 of 16 epochs
#   trial 4: last loss    nan, trained for 16 of 16 epochs
#   trial 5: last loss  6.000, trained for  1 of 16 epochs
#   trial 6: last loss    nan, trained for 16 of 16 epochs
#   trial 7: last loss  8.000, trained for  1 of 16 epochs
# Matters:  a search over learning rates meets those that diverge; they would train to the end.
# Guard:    a loss that is not finite ends the trial at once, and ASHA takes a missing value for the worst:
#           `tests/training/test_finetune.py::test_divergence`,
#           `tests/search/test_stopping.py::test_a_missing_value_is_worse_than_any`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'ray[tune]==2.60.0' numpy==2.4.6

cd "$folder"
export RAY_USAGE_STATS_ENABLED=0 RAY_AIR_NEW_OUTPUT=0
"$folder/venv/bin/python" -W ignore - <<'EOF' 2> "$folder/log.txt" || { tail -n 20 "$folder/log.txt"; exit 1; }
import math
import os

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

EPOCHS = 16


class Trial(tune.Trainable):
    """Every second trial has no finite loss; the others differ in loss, the first being the best."""

    def setup(self, config):
        self.reset_config(config)

    def reset_config(self, config):
        self.number, self.epoch = config["number"], 0
        return True

    def step(self):
        self.epoch += 1
        loss = math.nan if self.number % 2 == 0 else self.number + 1 / self.epoch
        return {"loss": loss, "epoch": self.epoch, "done": self.epoch == EPOCHS}

    def save_checkpoint(self, folder):
        pass


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", _temp_dir=os.getcwd())
scheduler = ASHAScheduler(time_attr="epoch", max_t=EPOCHS, grace_period=1, reduction_factor=2)
results = tune.Tuner(
    Trial,
    param_space={"number": tune.grid_search(list(range(8)))},
    tune_config=tune.TuneConfig(
        metric="loss", mode="min", scheduler=scheduler, max_concurrent_trials=1, reuse_actors=True
    ),
    run_config=tune.RunConfig(storage_path=os.path.join(os.getcwd(), "results"), verbose=0),
).fit()
epochs = {"nan": [], "finite": []}
for result in results:
    loss, epoch = result.metrics["loss"], result.metrics["epoch"]
    epochs["nan" if math.isnan(loss) else "finite"].append(epoch)
    print(f"trial {result.config['number']}: last loss {loss:6.3f}, trained for {epoch:2} of {EPOCHS} epochs")
ray.shutdown()
assert epochs["nan"] == [EPOCHS] * 4, "a trial without a finite loss is stopped now"
assert epochs["finite"] == [EPOCHS, 1, 1, 1]
EOF
