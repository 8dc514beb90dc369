#!/usr/bin/env bash
# Library:  Ray Tune 2.60.0 with Optuna 5.0.0, OptunaSearch under ASHAScheduler.
# Expected: Optuna learns how a trial ended: completed, pruned or failed.
# Happens:  a trial that ASHA stopped is COMPLETE, with the loss of its first epoch as its final value, compared by the
#           sampler with trials of all epochs. A trial whose loss is NaN has ended, and stays RUNNING in the study.
# Seen:
#   good       ended after 8 of 8 epochs; in Optuna's study: COMPLETE, value 0.125
#   bad        ended after 1 of 8 epochs; in Optuna's study: COMPLETE, value 2.0
#   worse      ended after 1 of 8 epochs; in Optuna's study: COMPLETE, value 3.0
#   not finite ended after 8 of 8 epochs; in Optuna's study: RUNNING, value None
# Matters:  the sampler takes slow starters for bad configurations, and never learns to avoid those that diverge.
# Guard:    this project reports every end to the study itself, by the trial's status:
#           `tests/search/test_optimizer.py::test_every_end_is_told`,
#           `tests/search/test_driver.py::test_no_trial_stays_running_in_the_study`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  'ray[tune]==2.60.0' optuna==5.0.0 numpy==2.4.6

cd "$folder"
export RAY_USAGE_STATS_ENABLED=0 RAY_AIR_NEW_OUTPUT=0
"$folder/venv/bin/python" -W ignore - <<'EOF' 2> "$folder/log.txt" || { tail -n 20 "$folder/log.txt"; exit 1; }
import math
import os

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

EPOCHS = 8
KINDS = ["good", "bad", "worse", "not finite"]


class Trial(tune.Trainable):
    """Its loss falls with the epochs; those of bad kinds begin higher, or are not finite."""

    def setup(self, config):
        self.reset_config(config)

    def reset_config(self, config):
        self.kind, self.epoch = config["kind"], 0
        return True

    def step(self):
        self.epoch += 1
        loss = math.nan if self.kind == "not finite" else KINDS.index(self.kind) + 1 / self.epoch
        return {"loss": loss, "epoch": self.epoch, "done": self.epoch == EPOCHS}

    def save_checkpoint(self, folder):
        pass


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", _temp_dir=os.getcwd())
search = OptunaSearch(metric="loss", mode="min", points_to_evaluate=[{"kind": kind} for kind in KINDS])
results = tune.Tuner(
    Trial,
    param_space={"kind": tune.choice(KINDS)},
    tune_config=tune.TuneConfig(
        metric="loss",
        mode="min",
        search_alg=search,
        scheduler=ASHAScheduler(time_attr="epoch", max_t=EPOCHS, grace_period=1, reduction_factor=2),
        num_samples=len(KINDS),
        max_concurrent_trials=1,
        reuse_actors=True,
    ),
    run_config=tune.RunConfig(storage_path=os.path.join(os.getcwd(), "results"), verbose=0),
).fit()
ends = {result.config["kind"]: result.metrics["epoch"] for result in results}
found = {trial.params["kind"]: (trial.state.name, trial.value) for trial in search._ot_study.trials}
for kind, epoch in ends.items():
    state, value = found[kind]
    print(f"{kind:10} ended after {epoch} of {EPOCHS} epochs; in Optuna's study: {state}, value {value}")
ray.shutdown()
assert ends == {"good": EPOCHS, "bad": 1, "worse": 1, "not finite": EPOCHS}
stopped = found["bad"], found["worse"]
assert stopped == (("COMPLETE", 2.0), ("COMPLETE", 3.0)), "a stopped trial is no longer COMPLETE"
assert found["not finite"] == ("RUNNING", None), "a trial without a finite loss no longer stays RUNNING"
EOF
