#!/usr/bin/env bash
# Library:  Optuna 5.0.0, Study.enqueue_trial.
# Expected: a value outside its range is refused, or clipped.
# Happens:  it depends on the kind of parameter and on the way in. An enqueued number is used as it is: suggest_float
#           returns 5.0 for the range 0 to 0.5, with a warning, and the study's best parameters lie outside its own
#           space. An enqueued category that is no choice, and the same number in create_trial, raise ValueError.
# Seen:
#   enqueue_trial, float: suggest_float('dropout', 0, 0.5) returns 5.0, UserWarning
#   best_params: {'dropout': 5.0}
#   enqueue_trial, categorical: ValueError: 'linear' not in ('cosine', 'constant').
#   create_trial, float: ValueError: The value 5.0 of parameter 'dropout' isn't contained in the distribution \
#     FloatDistribution(high=0.5, log=False, low=0.0, step=None).
# Matters:  start points, and the trials of another run, come from files that people write and edit.
# Guard:    start points are checked against the space when its file is read, and another run's trials outside the space
#           are left out: `tests/settings/test_space_file.py::test_start_points_are_checked`,
#           `tests/search/test_optimizer.py::test_another_run_is_read_by_rank_thinned_and_held_to_the_space`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check optuna==5.0.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'EOF'
import warnings

import optuna
from optuna.distributions import FloatDistribution

optuna.logging.set_verbosity(optuna.logging.ERROR)
study = optuna.create_study()

study.enqueue_trial({"dropout": 5.0})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trial = study.ask()
    number = trial.suggest_float("dropout", 0.0, 0.5)
    study.tell(trial, 0.1)
print(f"enqueue_trial, float: suggest_float('dropout', 0, 0.5) returns {number}, {caught[0].category.__name__}")
print(f"best_params: {study.best_params}")

study.enqueue_trial({"schedule": "linear"})
trial = study.ask()
try:
    category = trial.suggest_categorical("schedule", ["cosine", "constant"])
except ValueError as error:
    category = f"ValueError: {error}"
print(f"enqueue_trial, categorical: {category}")

try:
    made = optuna.trial.create_trial(
        params={"dropout": 5.0}, distributions={"dropout": FloatDistribution(0.0, 0.5)}, value=0.1
    )
except ValueError as error:
    made = f"ValueError: {error}"
print(f"create_trial, float: {made}")

assert number == 5.0 and study.best_params["dropout"] == 5.0, "a number out of range is no longer used"
assert category.startswith("ValueError") and str(made).startswith("ValueError")
EOF
