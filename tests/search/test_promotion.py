"""Stopped trials that continue: promoted by their rung, or since there is time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from searches import make_run, run_here

from tuning.record.journal import PROMOTED, Record, Trial, read_journal
from tuning.record.tables import read_table
from tuning.search import checkpoints, worker
from tuning.search.checkpoints import best_file, state_file
from tuning.search.finalists import saved_before_promotions
from tuning.search.promotion import best_stopped, spare_seconds
from tuning.search.stopping import ANY, Rungs
from tuning.settings.config import SearchPlan
from tuning.training.state import State

SEED = 5  # with which a trial is promoted at two rungs
START = {"unfreeze_depth": 0, "learning_rate": 1e-3, "augmentation": "none"}
VALUES = st.floats(0, 10) | st.none() | st.just(math.nan)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", ANY]), VALUES), max_size=40), st.integers(2, 4))
def test_those_who_pass_a_rung_are_those_who_would_continue(entries, factor):
    rungs = Rungs(grace_epochs=1, reduction_factor=factor, epochs=9)
    for number, (kind, value) in enumerate(entries):
        rungs.enter(f"t{number}", 1, kind, value)
    passing = rungs.passing(1)
    again = [rungs.decide(f"t{number}", 1, value, kind) for number, (kind, value) in enumerate(entries)]
    assert set(passing) == {f"t{number}" for number, made in enumerate(again) if made.verdict != "stop"}
    values = [again[int(trial_id[1:])].value for trial_id in passing]
    finite = [value for value in values if value is not None and not math.isnan(value)]
    assert finite == sorted(finite) and values[: len(finite)] == finite


@pytest.fixture(scope="module")
def promoted(tmp_path_factory, folder):
    """A search in which stopped trials are promoted, with one slot, and what it left."""
    run = tmp_path_factory.mktemp("promoted") / "run"
    search = make_run(run, folder, seed=SEED, trials=12)()
    run_here(search)
    assert PROMOTED in set(decided(run)["verdict"]), "take another SEED"
    return run, search


def decided(run):
    return read_table(run / "decisions.parquet")


def curves(run):
    epochs = read_table(run / "epochs.parquet").sort_values(["trial_id", "epoch"])
    columns = ["trial_id", "epoch", "train_loss", "val_loss", "train_eval_loss", "early_loss"]
    return epochs[columns].astype(object).where(epochs[columns].notna(), None).to_dict("records")


@pytest.mark.slow
def test_a_promoted_trial_goes_on_after_the_epoch_at_which_it_was_stopped(promoted):
    run, _ = promoted
    table = decided(run)
    names = set(table.loc[table["verdict"] == PROMOTED, "trial_id"])
    trials = read_table(run / "trials.parquet").set_index("trial_id")
    for trial_id in names:
        rows = table[table["trial_id"] == trial_id]
        for place in range(len(rows)):
            if rows["verdict"].iloc[place] == PROMOTED:
                stop = rows.iloc[place - 1]
                assert stop["verdict"] == "stop" and stop["epoch"] == rows["epoch"].iloc[place]
                assert trials.loc[trial_id, "epochs"] > stop["epoch"]
    epochs = read_table(run / "epochs.parquet")
    assert not epochs.duplicated(["trial_id", "epoch"]).any()
    assert set(trials["status"]) <= {"completed", "stopped", "diverged"} and len(trials) == 12


@pytest.mark.slow
def test_its_epochs_are_those_of_a_trial_that_was_never_stopped(promoted, tmp_path, folder):
    """Of each promoted configuration, trained alone to the end."""
    run, search = promoted
    for trial in search.record.trials.values():
        if any(row["verdict"] == PROMOTED for row in trial.decisions):
            alone = tmp_path / trial.trial_id
            settings = {"seed": SEED, "trials": 1, "early_stopping": False, "early_loss": "always"}
            run_here(make_run(alone, folder, start=[trial.params], **settings)())
            expected = [row["val_loss"] for row in curves(alone)]
            found = [row["val_loss"] for row in curves(run) if row["trial_id"] == trial.trial_id]
            assert found == expected[: len(found)] and len(found) > 1


@pytest.mark.slow
@pytest.mark.parametrize("share", [1e9, 1e-9])
def test_it_goes_on_from_its_checkpoint_where_that_is_cheap(promoted, tmp_path, folder, monkeypatch, share):
    """Else it is trained again. Either way its epochs are the same, and so are the decisions."""
    run, _ = promoted
    monkeypatch.setattr(worker, "STOPPED_SHARE", share)
    other = tmp_path / "run"
    run_here(make_run(other, folder, seed=SEED, trials=12)())
    resumed = [event for event in read_journal(other / "journal.jsonl") if event["event"] == "resumed"]
    promotions = (decided(run)["verdict"] == PROMOTED).sum()
    assert [event["from_epoch"] for event in resumed] == [0] * (0 if share > 1 else promotions)
    assert curves(other) == curves(run)
    assert decided(other).drop(columns="seq").equals(decided(run).drop(columns="seq"))
    assert not list((other / "checkpoints").glob("*.state.*"))  # of no use once the search has ended


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9])
def test_a_search_cut_anywhere_goes_on_to_the_same_end(promoted, tmp_path, folder, share):
    run, _ = promoted
    cut = tmp_path / "run"
    make = make_run(cut, folder, seed=SEED, trials=12)
    journal = (run / "journal.jsonl").read_bytes()
    (cut / "journal.jsonl").write_bytes(journal[: int(len(journal) * share)])
    run_here(make())
    assert curves(cut) == curves(run)
    assert decided(cut).drop(columns="seq").equals(decided(run).drop(columns="seq"))
    columns = ["trial_id", "status", "reason", "epochs", "val_loss"]
    assert read_table(cut / "trials.parquet")[columns].equals(read_table(run / "trials.parquet")[columns])


@pytest.mark.slow
def test_every_cut_just_after_a_promotion_goes_on_to_the_same_end(promoted, tmp_path, folder):
    run, _ = promoted
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    events = read_journal(run / "journal.jsonl")
    cuts = [place for place, event in enumerate(events, 1) if event.get("verdict") == PROMOTED]
    assert cuts
    for place in cuts:
        cut = tmp_path / f"run{place}"
        make = make_run(cut, folder, seed=SEED, trials=12)
        (cut / "journal.jsonl").write_bytes(b"".join(lines[:place]))
        run_here(make())
        assert curves(cut) == curves(run)


@pytest.mark.slow
def test_none_is_promoted_if_that_is_off(tmp_path, folder):
    run_here(make_run(tmp_path / "run", folder, seed=SEED, trials=12, promote=False)())
    assert PROMOTED not in set(decided(tmp_path / "run")["verdict"])


@pytest.mark.slow
def test_the_study_has_each_trial_once(promoted):
    _, search = promoted
    tried = [str(sorted(trial.params.items())) for trial in search.optimizer.study.trials]
    assert len(tried) == len(set(tried)) == 12
    assert set(tried) == {str(sorted(trial.params.items())) for trial in search.record.trials.values()}


@pytest.mark.slow
def test_with_time_left_all_stopped_trials_go_on_and_then_come_the_finalists(tmp_path, folder):
    settings = {"trials": 6, "finalist_seeds": 3, "finalist_epochs": 24, "time_budget": 1e6}
    run_here(make_run(tmp_path / "run", folder, start=[START], **settings)())
    trials = read_table(tmp_path / "run" / "trials.parquet")
    searched = trials[trials["origin"] != "finalist"]
    assert set(searched["status"]) <= {"completed", "converged"} and len(searched) == 6
    table = decided(tmp_path / "run")
    assert PROMOTED in set(table["verdict"])
    runs = trials[trials["origin"] == "finalist"]
    assert len(runs) == 6 and runs["started_at"].min() >= searched["ended_at"].max()


@pytest.mark.parametrize(
    ("promoting", "most", "kept"),
    [
        (False, 10**9, {f"t0000{number}.best" for number in range(5)}),
        (True, 10**9, {f"t0000{number}.{kind}" for number in range(6) for kind in ("best", "state")}),
        (True, 700, {*(f"t0000{number}.best" for number in range(5)), "t00000.state", "t00001.state"}),
    ],
)
def test_what_a_promotion_needs_is_kept_within_bounds(tmp_path, monkeypatch, promoting, most, kept):
    """Of eight stopped trials, the first the best."""
    monkeypatch.setattr(checkpoints, "KEPT_STATES", 6)
    (tmp_path / "checkpoints").mkdir()
    trials = {}
    for number in range(8):
        name = f"t{number:05d}"
        row = {"epoch": 1, "val_loss": float(number)}
        trials[name] = Trial(name, number, "suggested", {}, {}, status="stopped", rows=[row])
        for path in (state_file(tmp_path, name), best_file(tmp_path, name)):
            path.write_bytes(b"x" * 100)
    checkpoints.delete_unneeded(tmp_path, trials, "val_loss", most, None, promoting=promoting)
    assert {path.name.removesuffix(".safetensors") for path in (tmp_path / "checkpoints").iterdir()} == kept


def test_a_state_of_another_configuration_is_not_resumed(tmp_path):
    """A driver was killed before the journal knew the trial, and its number now has another configuration."""
    state, config = State([{"epoch": 1, "val_loss": 0.5}], {"model/weight": torch.ones(2)}), {"learning_rate": 0.1}
    checkpoints.save(tmp_path, "t00007", state, None, config, ended=False)
    assert checkpoints.load_state(tmp_path, "t00007", {"learning_rate": 0.01}) is None
    assert checkpoints.load_state(tmp_path, "t00007", config).history == state.history


def test_promoted_trials_take_nothing_from_the_finalists():
    """Two trials were stopped after an epoch, one of them then promoted to its end; one has diverged."""
    plan = SearchPlan(name="x", epochs=9)
    rows = [{"epoch": epoch, "val_loss": 1.0} for epoch in range(1, 10)]
    stop, on = {"epoch": 1, "verdict": "stop"}, {"epoch": 1, "verdict": PROMOTED}
    ends = [("stopped", 1, [stop]), ("completed", 9, [stop, on]), ("diverged", 4, []), ("completed", 9, [])]
    trials = {
        f"t{number}": Trial(f"t{number}", number, "suggested", {}, {}, status=status, rows=rows[:count], decisions=made)
        for number, (status, count, made) in enumerate(ends)
    }
    assert saved_before_promotions(Record(trials=trials), plan) == 8 + 8 + 5


def test_how_long_a_stopped_trial_may_go_on():
    plan = SearchPlan(name="x", epochs=4, finalists=1, finalist_epochs=6)
    trials = {
        name: Trial(name, number, "suggested", {}, {}, status=status, rows=[{"seconds": 2.0}] * epochs)
        for number, (name, status, epochs) in enumerate([("a", "stopped", 1), ("b", "running", 3), ("c", None, 0)])
    }
    record = Record(trials)
    running = [trials["b"], trials["c"]]
    assert spare_seconds(record, plan, [], math.inf, 2) == 0
    assert spare_seconds(record, plan, running, math.inf, 2) == 2  # of the one that runs; of the other nothing is known
    assert spare_seconds(record, plan, [], 100.0, 2) == 100 - 6 * 2 / 2  # but for the finalists' runs, in two slots
    assert spare_seconds(record, plan, running, 7.0, 2) == 2
    assert spare_seconds(record, plan, running, 1.5, 2) == 1.5
    trials["a"].decisions = [{"rung": 1, "value": 0.5}]
    found = [best_stopped(record, plan, seconds, lambda trial: True) for seconds in (6.0, 5.9)]
    assert found == [trials["a"], None]
    found = [best_stopped(record, plan, seconds, lambda trial: False) for seconds in (8.0, 7.9)]
    assert found == [trials["a"], None]  # it would be trained again
