import math

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tuning.record.journal import PROMOTED, Trial
from tuning.search.optimizer import LiveStudy, Optimizer, check_study, read_priors
from tuning.settings.config import InputError
from tuning.settings.space import configurations, same
from tuning.settings.space_file import fix, parse

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
        rebuilt.restore(trial)
        again = rebuilt.study.trials[0]
        assert (again.state, again.value, again.params) == (state, value, told.study.trials[0].params)
        assert again.intermediate_values == told.study.trials[0].intermediate_values


def test_a_stopped_trial_is_told_with_what_it_showed_early():
    bridge = optimizer()
    trial = ended(0, bridge.ask(0), "stopped", [15.0, 17.0])
    trial.rows = [row | {"early_loss": loss} for row, loss in zip(trial.rows, [0.9, 0.6], strict=True)]
    bridge.tell(trial)
    assert (bridge.study.trials[0].state, bridge.study.trials[0].value) == (TrialState.COMPLETE, 0.6)

    by_auroc = Optimizer(SPACE, seed=3, metric="val_auroc")
    trial = ended(0, by_auroc.ask(0), "stopped", [15.0])
    trial.rows = [trial.rows[0] | {"early_loss": 0.9, "val_auroc": 0.8}]
    by_auroc.tell(trial)
    assert (by_auroc.study.trials[0].state, by_auroc.study.trials[0].value) == (TrialState.PRUNED, -0.8)


def passed(trial, early_losses):
    """The trial, which goes on after having shown these at its first epochs."""
    trial.rows = [{"epoch": epoch, "val_loss": 15.0, "early_loss": loss} for epoch, loss in enumerate(early_losses, 1)]
    trial.decisions = [{"epoch": len(early_losses), "verdict": "continue"}]
    return trial


def told(bridge):
    return sorted((trial.state.name, trial.value or 0) for trial in bridge.study.trials)


def test_a_running_trial_is_told_with_what_it_has_shown_at_its_rungs():
    bridge, again = optimizer(), optimizer()
    trial = ended(0, bridge.ask(0), "running", [15.0])
    bridge.passed_rung(trial)  # without an early_loss nothing can be said
    bridge.ask(1)
    assert told(bridge) == [("RUNNING", 0), ("RUNNING", 0)]
    bridge.passed_rung(passed(trial, [0.6]))
    bridge.ask(2)
    assert told(bridge) == [("COMPLETE", 0.6), ("RUNNING", 0), ("RUNNING", 0)]

    # One that shows more at its next rung, and what another start makes of it; rows after the rung don't count.
    passed(trial, [0.6, 0.9, 0.5]).rows.append({"epoch": 4, "val_loss": 15.0, "early_loss": 0.1})
    bridge.passed_rung(trial)
    again.restore(trial)
    bridge.ask(3)
    again.ask(3)
    assert told(bridge)[0] == told(again)[0] == ("COMPLETE", 0.5)

    # Its end takes the place of all that.
    bridge.tell(ended(0, trial.params, "completed", [0.9, 0.3]))
    bridge.ask(4)
    assert told(bridge) == [("COMPLETE", 0.3), *[("RUNNING", 0)] * 4]


@pytest.mark.parametrize("warm", [False, True])
def test_with_one_slot_a_rebuilt_study_asks_the_same_after_rungs_and_from_another_run(warm):
    priors = read_priors(other_run([1e-1, 1e-2, 1e-3, 1e-4]), SPACE, "val_loss", 1.0)[0] if warm else []
    bridge = Optimizer(SPACE, seed=3, metric="val_loss", priors=priors, local_search=True)
    trials = []
    for number in range(25):
        again = Optimizer(SPACE, seed=3, metric="val_loss", priors=priors, local_search=True)
        for trial in trials:
            again.restore(trial)
        params = bridge.ask(number)
        assert again.ask(number) == params
        loss = abs(math.log10(params["learning_rate"]) + 3)
        trial = ended(number, params, "running", [loss])
        if number % 4:
            bridge.passed_rung(passed(trial, [loss + 0.5]))
        trial.status = ("completed", "stopped", "diverged")[number % 3]
        trial.rows = [*trial.rows, {"epoch": len(trial.rows) + 1, "val_loss": loss, "early_loss": None}]
        bridge.tell(trial)
        trials.append(trial)


@pytest.mark.parametrize("warm", [False, True])
def test_with_one_slot_a_rebuilt_study_asks_the_same_after_promotions(warm):
    given = {"seed": 3, "metric": "val_loss", "local_search": True}
    given["priors"] = read_priors(other_run([1e-1, 1e-2, 1e-3, 1e-4]), SPACE, "val_loss", 1.0)[0] if warm else []
    bridge, in_order, stopped = Optimizer(SPACE, **given), [], []
    for number in range(125):
        if number < 30 or number > 98:
            again = Optimizer(SPACE, **given)
            for trial in in_order:
                again.restore(trial)
            expected = again.ask(number)
        params = bridge.ask(number)
        if number < 30 or number > 98:
            assert params == expected
            assert told(bridge) == told(again)
        loss = abs(math.log10(params["learning_rate"]) + 3)
        trial = passed(ended(number, params, "stopped", []), [loss + 0.5])
        bridge.passed_rung(trial)
        trial.decisions[0]["verdict"] = "stop"
        bridge.tell(trial)
        in_order.append(trial)
        stopped.append(trial)
        if number % 3 == 2:  # the best of the stopped ones goes on to its end
            trial = min(stopped, key=lambda trial: trial.rows[0]["early_loss"])
            bridge.reopen(trial)
            trial.decisions = [*trial.decisions, {"epoch": 1, "verdict": PROMOTED}]
            trial.rows = [*trial.rows, {"epoch": 2, "val_loss": trial.rows[0]["early_loss"] - 0.5, "early_loss": None}]
            trial.status = "completed"
            bridge.tell(trial)
            in_order.remove(trial)
            in_order.append(trial)
            stopped.remove(trial)


@pytest.mark.parametrize("warm", [False, True])
def test_with_several_slots_the_study_knows_every_trial_once(monkeypatch, warm):
    monkeypatch.setattr("tuning.search.optimizer.MOST_SEEN", 20)
    monkeypatch.setattr("tuning.search.optimizer.SLACK", 6)
    priors = read_priors(other_run([1e-2, 1e-3]), SPACE, "val_loss", 1.0)[0] if warm else []
    bridge = Optimizer(SPACE, seed=3, metric="val_loss", priors=priors)
    random, running = np.random.default_rng(0), {}
    for number in range(60):
        running[number] = ended(number, bridge.ask(number), "running", [])
        shown = [other for other, trial in running.items() if trial.rows]
        states = [trial.state for trial in bridge.study.trials]
        assert states.count(TrialState.RUNNING) == len(running) - len(shown)
        if number < 20:
            assert len(states) == number + 1 + len(priors)
        for other in list(running):
            trial = running[other]
            if random.random() < 0.5:
                bridge.passed_rung(passed(trial, [*[row["early_loss"] for row in trial.rows], random.random()]))
            elif random.random() < 0.4:
                bridge.tell(ended(other, trial.params, "completed", [random.random()]))
                del running[other]


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
        later.restore(trial)
    for bridge in (first, later):
        bridge.tell(ended(15, unfinished.params, "completed", [0.5]))
        assert all(trial.state != TrialState.RUNNING for trial in bridge.study.trials)
    assert first.ask(16) == later.ask(16)


def test_a_region_that_diverges_is_avoided():
    bridge = optimizer()
    diverged = []
    for number in range(120):
        params = bridge.ask(number)
        loss = abs(math.log10(params["learning_rate"]) + 4)  # half of the range diverges
        diverged.append(loss >= 1)
        bridge.tell(ended(number, params, "diverged" if loss >= 1 else "completed", [None] if loss >= 1 else [loss]))
    assert sum(diverged[60:]) <= 18


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=pytest.mark.slow), "random"])
def test_every_sampler_suggests_and_learns_or_does_not(sampler):
    bridge = Optimizer(SPACE, seed=0, metric="val_loss", sampler=sampler)
    rates = []
    for number in range(40):
        params = bridge.ask(number)
        rates.append(params["learning_rate"])
        bridge.tell(ended(number, params, "completed", [abs(math.log10(params["learning_rate"]) + 4)]))
    near = sum(3e-5 < rate < 3e-4 for rate in rates[20:])  # by chance 5
    assert near >= {"tpe": 8, "gp": 10, "random": 0}[sampler]


def test_of_many_trials_the_best_and_the_newest_are_seen(monkeypatch):
    monkeypatch.setattr("tuning.search.optimizer.MOST_SEEN", 10)
    monkeypatch.setattr("tuning.search.optimizer.SLACK", 4)
    bridge, again = optimizer(), optimizer()
    running = bridge.ask(100)
    trials = []
    for number in range(14):
        params = bridge.ask(number)
        trials.append(ended(number, params, "stopped" if number == 0 else "completed", [(number * 5) % 14 + 1.0]))
        bridge.tell(trials[-1])
    told = bridge.study.get_trials(states=[TrialState.COMPLETE])
    values = [(number * 5) % 14 + 1.0 for number in range(14)]
    best_of_older = sorted(values[1:9])[:5]
    assert sorted(trial.value for trial in told) == sorted([*best_of_older, *values[9:]])
    assert [trial.params for trial in bridge.study.get_trials(states=[TrialState.RUNNING])] == [running]
    again.ask(100)
    for trial in trials:
        again.restore(trial)
    assert [trial.value for trial in again.study.get_trials(states=[TrialState.COMPLETE])] == [
        trial.value for trial in told
    ]
    bridge.tell(ended(100, running, "completed", [0.1]))
    again.tell(ended(100, running, "completed", [0.1]))
    assert bridge.ask(101) == again.ask(101)


def other_run(rates, **changed):
    rows = [
        {
            "origin": "suggested",
            "status": "completed",
            "epochs": 4,
            "val_loss": abs(math.log10(rate) + 2),
            "config_backbone": "test_resnet",
            "config_unfreeze_depth": 1,
            "config_learning_rate": rate,
            "config_stage_lr_decay": 1.0,
        }
        | changed
        for rate in rates
    ]
    return pd.DataFrame(rows)


def test_another_run_is_read_by_rank_thinned_and_held_to_the_space():
    priors, outside, otherwise = read_priors(other_run([1e-2, 1e-3, 1e-4, 0.5]), SPACE, "val_loss", 1.0)
    assert [prior["params"]["learning_rate"] for prior in priors] == [1e-2, 1e-3, 1e-4]
    assert [prior["rank"] for prior in priors] == pytest.approx([0.0, 1 / 3 * 1, 1.0], abs=0.4)
    assert outside == 1 and not otherwise
    few, *_ = read_priors(other_run([10.0**-power for power in (1.5, 2, 2.5, 3, 3.5, 4)]), SPACE, "val_loss", 0.5)
    assert len(few) == 3
    assert read_priors(other_run([1e-3], config_backbone="resnet18"), SPACE, "val_loss", 1.0) == ([], 1, {})
    for changed in ({"status": "failed"}, {"status": "running"}, {"origin": "probe"}):
        assert read_priors(other_run([1e-3], **changed), SPACE, "val_loss", 1.0) == ([], 0, {})


def test_parameters_that_were_fixed_to_another_value_are_counted():
    """They say less about this space; a parameter that the other run's version didn't have is no other value."""
    fixed = fix(SPACE, {"unfreeze_depth": 0, "image_size": 64, "optimizer": "sgd"})
    other = other_run([1e-2, 1e-3, 1e-4], config_image_size=64).assign(config_unfreeze_depth=[0, 1, 2])
    priors, outside, otherwise = read_priors(other, fixed, "val_loss", 1.0)
    assert len(priors) == 3 and not outside and otherwise == {"unfreeze_depth": 2}


def test_what_another_run_knows_guides_the_first_suggestions_and_is_outweighed():
    rates = [10 ** -(1 + number / 10) for number in range(40)]
    priors, *_ = read_priors(other_run(rates), SPACE, "val_loss", 1.0)
    bridge = Optimizer(SPACE, seed=0, metric="val_loss", priors=priors)
    first = [bridge.ask(number)["learning_rate"] for number in range(30)]
    assert sum(2e-3 < rate < 5e-2 for rate in first) >= 15  # the other run's best was at 0.01; by chance 10
    for number in range(60):  # here it is at 0.0001
        params = {"unfreeze_depth": 1, "learning_rate": 10 ** -(1.5 + number / 20)}
        bridge.ask(100 + number, params)
        bridge.tell(ended(100 + number, params, "completed", [abs(math.log10(params["learning_rate"]) + 4)]))
    later = [bridge.ask(number)["learning_rate"] for number in range(200, 220)]
    assert sum(2e-5 < rate < 5e-4 for rate in later) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("url", ["sqlite:///{}/study.db", "{}/study.log"])
def test_a_live_study_shows_every_trial(tmp_path, url):
    url = url.format(tmp_path)
    live = LiveStudy(url, "run", SPACE, "this run")
    for number, status in enumerate(["completed", "stopped", "failed", "running"]):
        params = {"unfreeze_depth": 0, "learning_rate": 1e-3}
        trial = ended(number, params, status, [0.4, 0.5] if status == "stopped" else [0.5, 0.4])
        live.show({"event": "asked"}, trial, "val_loss")
        for row in trial.rows:
            live.show({"event": "epoch"} | row, trial, "val_loss")
        live.show({"event": "ended", "status": "interrupted"}, trial, "val_loss")  # as by an earlier start
        live.show({"event": "ended", "status": status}, trial, "val_loss")
    storage = url if url.startswith("sqlite") else JournalStorage(JournalFileBackend(url))
    shown = optuna.load_study(study_name="run", storage=storage).trials
    assert [trial.state.name for trial in shown] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert [trial.value for trial in shown[:2]] == [0.4, 0.5]  # of a pruned trial Optuna takes the last
    assert [trial.user_attrs["best val_loss"] for trial in shown[:2]] == [0.4, 0.4]
    assert shown[0].intermediate_values == {1: 0.5, 2: 0.4} and shown[0].params["learning_rate"] == 1e-3
    assert shown[3].user_attrs["trial_id"] == "t00003"
    stopped = ended(1, {"unfreeze_depth": 0, "learning_rate": 1e-3}, "stopped", [0.4, 0.5])
    stopped.rows = [{"event": "epoch"} | row for row in stopped.rows]
    live.show({"event": "decision", "verdict": "promoted"}, stopped, "val_loss")
    live.show({"event": "epoch", "epoch": 3, "val_loss": 0.3}, stopped, "val_loss")
    again = optuna.load_study(study_name="run", storage=storage).trials[-1]
    assert again.user_attrs["trial_id"] == "t00001" and again.state.name == "RUNNING"
    assert again.intermediate_values == {1: 0.4, 2: 0.5, 3: 0.3}
    for run_id in (None, "another run"):
        with pytest.raises(InputError, match="a study named run that this run didn't make"):
            check_study(url, "run", run_id)
    check_study(url, "run", "this run")
    LiveStudy(url, "run", SPACE, "this run")
    assert not optuna.load_study(study_name="run", storage=storage).trials
    with pytest.raises(InputError, match="optuna_storage"):
        check_study("nonsense://", "run", None)
    with pytest.raises(InputError, match=r"install the database driver \("):
        check_study("oracle://user@127.0.0.1/studies", "run", None)


@pytest.mark.parametrize("run_id", [None, "this run"])
def test_a_study_of_the_users_own_is_not_replaced(tmp_path, run_id):
    url = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="run", storage=url).optimize(lambda trial: trial.suggest_float("x", 0, 1), 2)
    with pytest.raises(InputError, match="no other study is replaced"):
        check_study(url, "run", run_id)
    with pytest.raises(InputError, match="no other study is replaced"):
        LiveStudy(url, "run", SPACE, "this run")
    assert len(optuna.load_study(study_name="run", storage=url).trials) == 2


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_finite_space_is_tried_without_repeats(sampler):
    parameters = {
        "unfreeze_depth": {"type": "int", "low": 0, "high": 2},
        "head_dropout": {"type": "float", "low": 0.0, "high": 0.3, "step": 0.1},
    }
    space = parse({"parameters": parameters, "fixed": {"backbone": "test_resnet"}}, "test")
    every, tried = configurations(space), []
    asked = Optimizer(space, seed=0, metric="val_loss", sampler=sampler, local_search=True)
    for number in range(len(every)):
        untried = {same(params): params for params in every if same(params) not in tried}
        params = asked.ask(number, None, untried)
        tried.append(same(params))
        asked.tell(ended(number, params, "completed", [params["head_dropout"] + params["unfreeze_depth"]]))
    assert len(set(tried)) == len(every) == 12
    told = [trial for trial in asked.study.trials if trial.state == TrialState.COMPLETE]
    assert len(told) == 12 and not [trial for trial in asked.study.trials if trial.state == TrialState.RUNNING]
