import math

import pytest
from optuna.trial import TrialState

from tuning.optimizer import Optimizer
from tuning.space import parse
from tuning.tables import Trial

SPACE = parse(
    {
        "parameters": {
            "unfreeze_depth": {"type": "int", "low": 0, "high": 5},
            "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
            "stage_lr_decay": {"type": "float", "low": 0.3, "high": 1.0, "when": "unfreeze_depth > 1"},
        },
        "fixed": {"backbone": "test_resnet"},
        "start": [{"unfreeze_depth": 0, "learning_rate": 1e-3}],
    },
    "test",
)


def ended(number, params, status, losses):
    rows = [{"epoch": epoch, "val_loss": loss} for epoch, loss in enumerate(losses, 1)]
    return Trial(f"t{number:05d}", number, "suggested", params, {}, status=status, rows=rows)


def optimizer():
    return Optimizer(SPACE, seed=3, metric="val_loss")


@pytest.mark.parametrize(
    ("status", "losses", "state", "value"),
    [
        ("completed", [0.9, 0.4, 0.5], TrialState.COMPLETE, 0.4),
        ("converged", [0.3, 0.4], TrialState.COMPLETE, 0.3),
        ("stopped", [0.9, 0.8], TrialState.PRUNED, 0.8),
        ("diverged", [0.9, None], TrialState.PRUNED, None),
        ("out_of_memory", [], TrialState.PRUNED, None),
        ("failed", [], TrialState.FAIL, None),
        ("interrupted", [0.9], TrialState.FAIL, None),
    ],
)
def test_every_end_is_told(status, losses, state, value):
    told, rebuilt = optimizer(), optimizer()
    trial = ended(0, told.ask(0), status, losses)
    told.tell(trial)
    assert (told.study.trials[0].state, told.study.trials[0].value) == (state, value)
    if status != "interrupted":
        rebuilt.remember(trial)
        again = rebuilt.study.trials[0]
        assert (again.state, again.value, again.params) == (state, value, told.study.trials[0].params)
        assert again.intermediate_values == told.study.trials[0].intermediate_values


def test_start_points_are_taken_as_they_are():
    assert optimizer().ask(0, SPACE.start[0]) == SPACE.start[0]


def test_a_rebuilt_study_asks_the_same():
    first, later = optimizer(), optimizer()
    trials = []
    for number in range(15):
        params = first.ask(number)
        trial = ended(number, params, ("completed", "stopped", "diverged")[number % 3], [params["learning_rate"]])
        first.tell(trial)
        trials.append(trial)
    unfinished = Trial("t00015", 15, "suggested", first.ask(15), {}, status="running")
    for trial in [*trials, unfinished]:
        later.remember(trial)
    for bridge in (first, later):
        bridge.tell(ended(15, unfinished.params, "completed", [0.5]))
        assert all(trial.state != TrialState.RUNNING for trial in bridge.study.trials)
    assert first.ask(16) == later.ask(16)


def test_a_region_that_diverges_is_avoided():
    bridge = optimizer()
    for number in range(40):
        params = bridge.ask(number)
        loss = abs(math.log10(params["learning_rate"]) + 4)
        bridge.tell(ended(number, params, "completed" if loss < 1 else "diverged", [loss] if loss < 1 else [None]))
    later = [1e-5 < bridge.ask(number)["learning_rate"] < 1e-3 for number in range(40, 60)]
    assert sum(later) >= 16
