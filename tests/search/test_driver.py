"""The driver with real Ray, real Optuna and a tiny network."""

import json
import math
import os
import signal
import time

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.error import TuneError
from searches import FIXED, PARAMETERS, FreeTrial, WorseTrial, make_run, run_here, workers
from shared import shared_ray

from tuning.record.journal import FINAL, read_journal
from tuning.record.predictions import read_predictions
from tuning.record.tables import make_tables, read_table
from tuning.search import gpus
from tuning.search.cluster import Slots
from tuning.search.driver import LOST_STARTS, Search
from tuning.search.finalists import finalist_runs_left
from tuning.settings.values import Weights

ROW = {  # of an epoch, but for its number and end
    **dict.fromkeys(("train_loss", "train_eval_loss", "val_loss", "val_accuracy", "val_balanced_accuracy"), 0.5),
    **dict.fromkeys(("val_auroc", "data_seconds", "evaluate_seconds", "train_seconds", "seconds"), 0.5),
    **dict.fromkeys(("prefix_seconds", "learning_rate"), 0.0),
    **{"images": 30, "cache_hits": 0, "micro_batch": 8, "batch_size": 8, "trained_parameters": 9, "unfreeze_depth": 1},
    **{"peak_memory_mb": 500.0, "gpu_memory_mb": 80_000.0},
}


@pytest.fixture
def ray_started():
    shared_ray()


def losses(run):
    epochs = read_table(run / "epochs.parquet").sort_values(["trial_id", "epoch"])
    columns = ["trial_id", "epoch", "train_loss", "val_loss", "train_eval_loss", "early_loss"]
    return epochs[columns].astype(object).where(epochs[columns].notna(), None).to_dict("records")


def decisions(run):
    return read_table(run / "decisions.parquet").drop(columns="seq").to_dict("records")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder):
    """An uninterrupted search with one slot, and what it left."""
    shared_ray()
    run = tmp_path_factory.mktemp("whole") / "run"
    make = make_run(run, folder, promote=False)  # test_promotion.py has the same with promoted trials
    search = make()
    assert search.run()
    return run, make, search


@pytest.mark.slow
def test_every_trial_is_there_once_with_a_reason(whole):
    run, make, _ = whole
    trials = read_table(run / "trials.parquet")
    assert list(trials["trial_id"]) == [f"t{number:05d}" for number in range(8)]
    assert set(trials["status"]) <= {"completed", "stopped"} and "stopped" in set(trials["status"])
    assert trials["reason"].str.len().min() > 10
    assert make.ended == list(trials.sort_values("ended_at")["trial_id"])
    epochs = read_table(run / "epochs.parquet")
    assert epochs.groupby("trial_id").size().to_dict() == trials.set_index("trial_id")["epochs"].to_dict()
    assert epochs["seq"].is_monotonic_increasing


@pytest.mark.slow
def test_stops_follow_from_the_decisions(whole):
    run, _, _ = whole
    trials = read_table(run / "trials.parquet").set_index("trial_id")
    table = read_table(run / "decisions.parquet")
    assert set(table["rung"]) <= {1, 2}
    for trial_id, verdicts in table.groupby("trial_id")["verdict"]:
        stopped = trials.loc[trial_id, "status"] == "stopped"
        assert list(verdicts) == ["continue"] * (len(verdicts) - stopped) + ["stop"] * stopped


@pytest.mark.slow
def test_no_trial_stays_running_in_the_study(whole):
    _, _, search = whole
    assert {trial.state for trial in search.optimizer.study.trials} <= {TrialState.COMPLETE, TrialState.PRUNED}


@pytest.mark.slow
def test_the_best_weights_are_kept_and_nothing_of_rays(whole):
    run, _, _ = whole
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert 1 <= len(kept) <= 5 and all(name.endswith(".best.safetensors") for name in kept)
    top = read_table(run / "trials.parquet").sort_values("val_loss")["trial_id"].iloc[0]
    assert f"{top}.best.safetensors" in kept
    tables = {"trials.parquet", "epochs.parquet", "decisions.parquet", "samples.parquet", "audit.parquet"}
    assert {path.name for path in run.iterdir()} == tables | {
        "journal.jsonl",
        "plan.yaml",
        "checkpoints",
        "predictions",
    }


@pytest.mark.slow
def test_every_trial_leaves_the_probabilities_of_its_best_epoch(whole):
    run, _, _ = whole
    trials, samples = read_table(run / "trials.parquet"), read_table(run / "samples.parquet")
    found = read_predictions(run, trials, samples)
    assert list(found.trial_ids) == list(trials.sort_values("val_loss")["trial_id"])
    assert found.losses.mean(axis=1) == pytest.approx(sorted(trials["val_loss"]), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "go_on"), [(0.45, Search.run), *((share, run_here) for share in (0.0, 0.2, 0.45, 0.7, 0.95))]
)
@pytest.mark.slow
def test_a_search_cut_anywhere_goes_on_to_the_same_end(whole, tmp_path, folder, share, go_on):
    """What a crash leaves is a journal cut at some event, possibly inside a line; no checkpoint is left here."""
    run, _, _ = whole
    cut = tmp_path / "run"
    again = make_run(cut, folder, promote=False)
    journal = (run / "journal.jsonl").read_bytes()
    (cut / "journal.jsonl").write_bytes(journal[: int(len(journal) * share)])
    before = [event for event in read_journal(cut / "journal.jsonl") if event["event"] == "ended"]
    go_on(again())
    events = read_journal(cut / "journal.jsonl")
    ended = [event["trial_id"] for event in events if event["event"] == "ended"]
    assert sorted(ended) == [f"t{number:05d}" for number in range(8)]
    assert [event["trial_id"] for event in before] == ended[: len(before)]
    assert losses(cut) == losses(run)
    assert decisions(cut) == decisions(run)


@pytest.mark.slow
def test_going_on_from_a_checkpoint_sends_its_history_first(whole, tmp_path, folder, ray_started):
    """The driver dies before it has heard of an epoch whose checkpoint is on disk."""
    run, _, _ = whole
    cut = tmp_path / "run"
    make = make_run(cut, folder, promote=False)
    search = make()
    seen = []

    def die(search, trial):
        seen.append(trial.trial_id)
        if len(seen) == 2:
            raise RuntimeError("the driver dies")

    search.show = die
    with pytest.raises(TuneError, match="the driver dies"):
        search.run()
    assert (cut / "checkpoints" / "t00000.state.safetensors").exists()
    events = read_journal(cut / "journal.jsonl")
    (cut / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events if event["seq"] <= 3))
    run_here(make())
    assert losses(cut) == losses(run)
    assert decisions(cut) == decisions(run)


JUDGED = {"trials": 4, "epochs": 2, "finalist_seeds": 3, "finalist_epochs": 18}
DEFAULT = {"unfreeze_depth": 5, "learning_rate": 1e-4, "augmentation": "none"}


@pytest.fixture(scope="module")
def judged(tmp_path_factory, folder):
    """A search with finalists, on splits drawn anew for each seed, with one slot."""
    shared_ray()
    run = tmp_path_factory.mktemp("judged") / "run"
    search = make_run(run, folder, start=[DEFAULT], **JUDGED)(redraw=True)
    assert search.run()
    return run, search


@pytest.mark.slow
def test_finalists_are_trained_again_in_pairs_after_the_search(judged):
    run, search = judged
    trials = read_table(run / "trials.parquet")
    searched, runs = trials.iloc[:4], trials.iloc[4:]
    assert list(runs["trial_id"]) == [f"f{number:05d}" for number in range(9)]
    assert set(runs["origin"]) == {"finalist"} and runs["number"].isna().all() and set(runs["epochs"]) == {2}
    assert list(runs["seed"]) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    best = list(searched.iloc[1:].sort_values("val_loss")["trial_id"][:2])
    assert list(runs["finalist_of"]) == ["t00000", *best] * 3
    assert runs["started_at"].min() >= searched["ended_at"].max()
    assert len(search.optimizer.study.trials) == 4 and set(read_table(run / "decisions.parquet")["trial_id"]) <= set(
        searched["trial_id"]
    )
    assert runs.groupby("finalist_of")["val_loss"].nunique().min() > 1  # other images, head and batches
    assert not list((run / "checkpoints").glob("f*"))
    assert {path.stem for path in (run / "predictions").iterdir()} == set(trials["trial_id"])
    known = read_predictions(run, trials, read_table(run / "samples.parquet"))  # finalists have other validation images
    assert set(known.trial_ids) == set(searched["trial_id"])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_search_cut_among_its_finalists_goes_on_to_the_same_end(judged, tmp_path, folder, share):
    run, _ = judged
    cut = tmp_path / "run"
    again = make_run(cut, folder, start=[DEFAULT], **JUDGED)
    journal = (run / "journal.jsonl").read_bytes()
    (cut / "journal.jsonl").write_bytes(journal[: int(len(journal) * share)])
    run_here(again(redraw=True))
    assert losses(cut) == losses(run)


@pytest.mark.slow
def test_a_finalist_that_waits_for_its_worker_is_not_asked_for_again(judged, tmp_path, folder):
    run, _ = judged
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    (asked,) = (place for place, each in enumerate(events) if (each["event"], each["trial_id"]) == ("asked", "f00000"))
    again = make_run(tmp_path / "run", folder, start=[DEFAULT], **JUDGED)
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / "journal.jsonl").write_bytes(b"".join(lines[: asked + 1]))
    search = again(redraw=True)
    left = [(trial.trial_id, seed) for trial, seed in finalist_runs_left(search.record, search.plan)]
    search.journal.close()
    assert len(left) == 8 and ("t00000", 1) not in left


@pytest.mark.slow
def test_an_extended_search_does_not_exceed_its_cap(judged, tmp_path, folder):
    run, _ = judged
    cut = tmp_path / "run"
    again = make_run(cut, folder, start=[DEFAULT], **JUDGED)
    (cut / "journal.jsonl").write_bytes((run / "journal.jsonl").read_bytes())
    run_here(again(redraw=True, trials=10))
    trials = read_table(cut / "trials.parquet")
    best = trials[trials["number"] > 0].nsmallest(1, "val_loss")["number"].item()
    assert best >= 4  # what the first verdict did not know
    assert trials.loc[trials["origin"] == "finalist", "epochs"].sum() == JUDGED["finalist_epochs"]


@pytest.mark.slow
def test_finalists_on_a_given_split_differ_by_seed_alone(judged, tmp_path, folder):
    run, _ = judged
    kept = tmp_path / "run"
    run_here(make_run(kept, folder, start=[DEFAULT], **JUDGED)(redraw=False))
    both = [read_table(path / "trials.parquet").set_index("trial_id")["val_loss"] for path in (run, kept)]
    assert (both[0][:4] == both[1][:4]).all() and (both[0][4:] != both[1][4:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"finalists": 0}, {"finalist_epochs": 11}, {"early_stopping": False}, {}])
def test_no_finalists_where_they_are_not_wanted_or_do_not_fit(tmp_path, folder, settings):
    run = tmp_path / "run"
    run_here(make_run(run, folder, **{"trials": 2, "epochs": 2} | settings)())
    assert set(read_table(run / "trials.parquet")["origin"]) == {"suggested"}


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "status"), [(2, "completed"), (4, "failed")])
def test_a_lost_worker_is_replaced_three_times(tmp_path, folder, kills, status, ray_started):
    run = tmp_path / "run"
    make = make_run(run, folder, trials=1)
    killed = []

    def kill(search, trial):
        if len(killed) < kills and trial.status == "running":
            (worker,) = workers()
            killed.append(worker)
            os.kill(worker, signal.SIGKILL)

    while workers():  # an earlier search's, on its way out
        time.sleep(0.1)
    search = make(trainable=FreeTrial)
    search.show = kill
    assert search.run()
    (trial,) = read_table(run / "trials.parquet").to_dict("records")
    assert (trial["status"], len(killed)) == (status, kills)
    assert trial["epochs"] == (4 if status == "completed" else 1)


@pytest.mark.slow
def test_a_promoted_trial_whose_worker_dies_goes_on(tmp_path, folder, ray_started):
    run, killed = tmp_path / "run", []

    def kill(search, trial):
        if not killed and trial.status == "running" and trial.decisions[-1]["verdict"] == "promoted":
            (worker,) = workers()
            killed.append(trial.trial_id)
            os.kill(worker, signal.SIGKILL)

    while workers():  # an earlier search's, on its way out
        time.sleep(0.1)
    search = make_run(run, folder, trials=6)(trainable=WorseTrial)
    search.show = kill
    assert search.run()
    assert killed == ["t00001"]
    trials = read_table(run / "trials.parquet")
    assert list(trials["trial_id"]) == [f"t{number:05d}" for number in range(6)]
    assert set(trials["status"]) <= {"completed", "stopped"}
    epochs, table = read_table(run / "epochs.parquet"), read_table(run / "decisions.parquet")
    assert not epochs.duplicated(["trial_id", "epoch"]).any()
    assert list(table.loc[table["trial_id"] == "t00001", "verdict"])[:2] == ["stop", "promoted"]


@pytest.mark.slow
def test_several_slots_lose_and_repeat_nothing(tmp_path, folder, ray_started):
    run = tmp_path / "run"
    assert make_run(run, folder, trials=10)(2, trainable=FreeTrial).run()
    trials = read_table(run / "trials.parquet")
    assert sorted(trials["trial_id"]) == [f"t{number:05d}" for number in range(10)]
    assert trials["status"].isin(FINAL).all()


@pytest.mark.slow
def test_learning_rates_without_bound_end_as_diverged(tmp_path, folder):
    run = tmp_path / "run"
    wide = {"learning_rate": {"type": "float", "low": 1e9, "high": 1e12, "log": True}}
    fixed = FIXED | {"optimizer": "sgd", "unfreeze_depth": 5}
    search = make_run(run, folder, parameters=wide, fixed=fixed, trials=4)()
    run_here(search)
    trials = read_table(run / "trials.parquet")
    assert set(trials["status"]) == {"diverged"}
    epochs = read_table(run / "epochs.parquet")
    lost = epochs[epochs["val_loss"].isna()]
    assert dict(zip(lost["trial_id"], lost["epoch"], strict=True)) == dict(
        zip(trials["trial_id"], trials["epochs"], strict=True)
    )
    assert all(trial.state != TrialState.RUNNING for trial in search.optimizer.study.trials)


@pytest.mark.slow
def test_a_trial_that_fails_has_its_error_and_the_search_goes_on(tmp_path, folder):
    run = tmp_path / "run"
    damaged = tmp_path / "test_vit.safetensors"
    damaged.write_bytes(b"no weights")
    both = PARAMETERS | {"backbone": {"type": "categorical", "choices": ["test_resnet", "test_vit"]}}
    fixed = {name: value for name, value in FIXED.items() if name != "backbone"}
    start = [
        {"backbone": name, "unfreeze_depth": 0, "learning_rate": 1e-3, "augmentation": "none"}
        for name in ("test_vit", "test_resnet")
    ]
    weights = {"test_resnet": None, "test_vit": Weights(file=damaged)}
    make = make_run(run, folder, parameters=both, fixed=fixed, start=start, weights=weights, trials=2)
    run_here(make())
    trials = read_table(run / "trials.parquet")
    assert list(trials["status"]) == ["failed", "completed"]
    assert "test_vit.safetensors" in trials["error"][0] and "Traceback" in trials["error"][0]


@pytest.mark.slow
def test_four_failures_at_first_end_the_search(tmp_path, folder):
    run = tmp_path / "run"
    damaged = tmp_path / "test_resnet.safetensors"
    damaged.write_bytes(b"no weights")
    search = make_run(run, folder, weights={"test_resnet": Weights(file=damaged)}, trials=20)()
    run_here(search)
    assert "the first 4 trials all failed" in search.halted
    assert len(read_table(run / "trials.parquet")) == 4


def test_what_killed_writers_left_is_deleted(tmp_path, folder):
    """Such as safetensors', which writes beside the file that it is given."""
    run = tmp_path / "run"
    make = make_run(run, folder)
    left = [run / ".trials.parquet.123", run / "checkpoints" / ".tmp7JhevL", run / "predictions" / ".t00000.parquet.5"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    make().journal.close()
    assert not any(path.exists() for path in left)


@pytest.mark.slow
def test_a_budget_that_ends_before_a_trial_has_begun_ends_cleanly(tmp_path, folder, ray_started):
    search = make_run(tmp_path / "run", folder)()
    ask = search.next_trial

    def last(ray_id):
        found = ask(ray_id)
        search.halted = "the time budget is used up"
        return found

    search.next_trial = last
    search.run()
    assert read_table(tmp_path / "run" / "trials.parquet")["epochs"].sum() == 0


@pytest.mark.slow
def test_the_time_budget_ends_cleanly_and_more_time_goes_on(tmp_path, folder, ray_started):
    run = tmp_path / "run"
    make = make_run(run, folder, trials=30, epochs=30, early_stopping=False)
    search = make(time_budget=1000.0)

    def shorten(search, trial):
        if search.plan.time_budget == 1000.0:  # once a worker has started, which may take long
            used = search.journal.wall_s - search.started_wall_s
            search.plan = search.plan.model_copy(update={"time_budget": used + 1.0})

    search.show = shorten
    assert search.run()
    assert "time budget" in search.halted
    trials = read_table(run / "trials.parquet")
    assert 1 <= len(trials) < 30 and "running" not in set(trials["status"])
    more = len(trials) + 1
    run_here(make(trials=more, time_budget=None))
    assert set(read_table(run / "trials.parquet")["status"]) == {"completed"}


@pytest.mark.slow
def test_trials_that_wait_for_nodes_do_not_begin_once_the_search_is_over(tmp_path, folder, ray_started, capsys):
    run = tmp_path / "run"
    search = make_run(run, folder, trials=40, epochs=1000, early_stopping=False)(count=40, trainable=FreeTrial)

    def end(search, trial):
        search.halted = "over"

    search.show = end
    assert search.run()
    waited = [trial for trial in search.record.trials.values() if not trial.rows]
    assert len(search.record.trials) == 40 and len(waited) >= 40 - os.cpu_count()
    assert "FreeTrial" not in capsys.readouterr().out  # Ray's own lines


@pytest.mark.slow
def test_without_early_stopping_every_epoch_is_run(tmp_path, folder):
    run = tmp_path / "run"
    start = [{"unfreeze_depth": 5, "learning_rate": rate, "augmentation": "none"} for rate in (1e-2, 1e-3, 1e-4)]
    run_here(make_run(run, folder, start=start, trials=3, early_stopping=False)())
    trials = read_table(run / "trials.parquet")
    assert list(trials["config_learning_rate"]) == [1e-2, 1e-3, 1e-4]
    assert set(trials["epochs"]) == {4} and set(trials["origin"]) == {"start"}
    assert read_table(run / "decisions.parquet").empty


@pytest.mark.slow
def test_the_tables_are_the_journal(whole):
    run, _, search = whole
    made = make_tables(search.record, search.plan.metric)
    for name in ("trials", "epochs", "decisions"):
        assert made[name].to_pandas().equals(read_table(run / f"{name}.parquet"))


def test_start_points_are_not_stopped_by_asha(tmp_path, folder):
    """As Ray tells, without it: the second start point is worse after an epoch, and so is a suggested trial."""
    start = [{"unfreeze_depth": 5, "learning_rate": rate, "augmentation": "none"} for rate in (1e-3, 1e-2)]
    search = make_run(tmp_path / "run", folder, start=start, trials=3)()
    goes_on = []
    for number, loss in enumerate((0.5, 0.7, 0.6)):
        search.next_trial(f"ray{number}")
        search.started(f"ray{number}")
        row = ROW | {"epoch": 1, "val_loss": loss, "val_tempered_loss": loss, "early_loss": loss}
        goes_on.append(search.result(f"ray{number}", row | {"ends": None, "reason": None}))
    search.journal.close()
    assert goes_on == [True, True, False]
    made = [trial.decisions[0]["verdict"] for trial in search.record.trials.values()]
    assert made == ["continue", "kept", "stop"]


def test_without_start_points_the_first_trial_is_the_default_and_is_not_stopped(tmp_path, folder):
    search = make_run(tmp_path / "run", folder, start=[], trials=3)()
    for number in range(3):
        search.next_trial(f"ray{number}")
        search.started(f"ray{number}")
    goes_on = []
    for number, loss in ((1, 0.5), (0, 0.9), (2, 0.8)):
        row = ROW | {"epoch": 1, "val_loss": loss, "val_tempered_loss": loss, "early_loss": loss}
        goes_on.append(search.result(f"ray{number}", row | {"ends": None, "reason": None}))
    search.journal.close()
    assert goes_on == [True, True, False]
    assert [trial.origin for trial in search.record.trials.values()] == ["suggested"] * 3


def test_trials_are_packed_once_some_have_been_measured(tmp_path, folder, monkeypatch):
    """As Ray asks and tells, without it: two trials fill two GPUs, the third waits until the first has ended."""
    monkeypatch.setattr(gpus, "MEASURED_FIRST", 1)
    rates = (1e-3, 2e-3, 3e-3, 4e-3)
    start = [{"unfreeze_depth": 1, "learning_rate": rate, "augmentation": "none"} for rate in rates]
    search = make_run(tmp_path / "run", folder, start=start)()
    search.resources = Slots(1, 1.0, 8, packed=2)
    given = [search.next_trial(f"ray{number}") for number in range(3)]
    search.started("ray0")
    search.result("ray0", ROW | {"epoch": 1, "ends": "completed", "reason": "all 1 epochs"})
    given += [search.next_trial(f"ray{number}") for number in (3, 4)]
    search.started("ray3")
    # The next is out of memory on its quarter, and gets a whole GPU, for which it waits.
    search.started("ray4")
    assert not search.result("ray4", {"ends": "out_of_memory", "reason": "CUDA out of memory", "error": "a traceback"})
    given.append(search.next_trial("ray5"))
    search.result("ray3", ROW | {"epoch": 1, "ends": "completed", "reason": "all 1 epochs"})
    given.append(search.next_trial("ray6"))
    search.journal.close()
    assert [trial and trial["gpus"] for trial in given] == [1.0, 1.0, None, 0.25, 0.25, None, 1.0]
    assert [trial and trial["number"] for trial in given] == [0, 1, None, 2, 3, None, 3]
    assert search.record.trials["t00002"].gpus == 0.25
    again = search.record.trials["t00003"]
    assert not again.ended and (again.losses, again.lost_starts) == (0, 0)


def test_four_trials_whose_workers_died_at_first_end_the_search(tmp_path, folder):
    search = make_run(tmp_path / "run", folder, trials=20)(2)
    for number in range(4 * (1 + LOST_STARTS)):
        assert search.halted is None
        search._schedule_at = -math.inf
        assert isinstance(search.next_trial(f"ray{number}"), dict)
        search.lost(f"ray{number}", "RayActorError: the worker died")
    search.journal.close()
    assert search.halted.startswith("the first 4 trials all failed")


def test_a_whole_gpu_that_no_longer_is_ends_the_search(tmp_path, folder):
    """A quarter of each of two is held."""
    search = make_run(tmp_path / "run", folder)()
    search.resources = Slots(1, 1.0, 8, packed=2, fitting=8)
    search._held_gpus = 0.5
    assert isinstance(search.next_trial("ray0"), dict)
    search._held_gpus, search._unfinished = 1.5, [search.record.trials["t00000"]]
    search._gpus.clear()
    assert search.next_trial("ray1") is None
    search.journal.close()
    assert search.halted.startswith("no whole GPU works")


@pytest.mark.parametrize(
    ("resources", "broken", "over"),
    [
        (Slots(1, 1.0, 2), 1, False),
        (Slots(1, 1.0, 2), 2, True),
        (Slots(1, 1.0, 2, fitting=8), 2, False),  # fewer trials at once than GPUs
        (Slots(1, 1.0, 10, fitting=1, waiting=True), 1, True),  # more than there are yet
        (Slots(1, 1.0, 8, packed=2, fitting=8), 1, False),
        (Slots(1, 1.0, 8, packed=2, fitting=8), 2, True),
    ],
)
def test_a_search_ends_once_no_slot_works(tmp_path, folder, resources, broken, over):
    search = make_run(tmp_path / "run", folder)()
    search.resources = resources
    for number in range(broken):
        search.next_trial(f"ray{number}")
        search.started(f"ray{number}")
        search.broken(f"ray{number}", "GPU 0 of here: CUDA error")
    search.journal.close()
    assert (search.halted is not None) == over
    assert not any(trial.ended for trial in search.record.trials.values())


@pytest.mark.slow
def test_probes_follow_start_points_count_as_no_trial_and_are_made_once(tmp_path, folder):
    parameters = PARAMETERS | {"backbone": {"type": "categorical", "choices": ["test_resnet", "test_vit"]}}
    fixed = {name: value for name, value in FIXED.items() if name != "backbone"}
    weights = {"test_resnet": None, "test_vit": None}
    run = tmp_path / "run"
    start = [{"backbone": "test_resnet", "unfreeze_depth": 0, "learning_rate": 1e-3, "augmentation": "none"}]
    make = make_run(run, folder, parameters=parameters, fixed=fixed, start=start, weights=weights, probe=True, trials=3)
    search = make()
    run_here(search)
    trials = read_table(run / "trials.parquet")
    assert list(trials["trial_id"]) == ["t00000", "p00000", "p00001", "t00001", "t00002"]
    probes = trials[trials["origin"] == "probe"]
    assert list(probes["config_backbone"]) == ["test_resnet", "test_vit"]
    assert list(probes["status"]) == ["completed"] * 2 and list(probes["epochs"]) == [1, 1]
    assert probes["number"].isna().all() and probes["val_loss"].notna().all()
    told = [trial.params["backbone"] for trial in search.optimizer.study.trials]
    assert told[:3] == ["test_resnet", "test_resnet", "test_vit"] and len(told) == 5

    again = make(trials=4)
    run_here(again)
    assert list(read_table(run / "trials.parquet")["trial_id"])[5:] == ["t00003"]


@pytest.mark.slow
def test_what_another_run_knows_is_journalled_and_outlives_a_restart(tmp_path, folder):
    run = tmp_path / "run"
    make = make_run(
        run, folder, trials=2, optuna_storage=f"sqlite:///file:{tmp_path}/study.db?uri=true&password=geheim"
    )
    prior = {"params": {"unfreeze_depth": 0, "learning_rate": 1e-3, "augmentation": "none"}, "status": "completed"}
    search = make(priors=[prior | {"epochs": 4, "rank": 0.0}])
    run_here(search)
    again = make(trials=3)
    run_here(again)
    assert not [path for path in run.rglob("*") if path.is_file() and b"geheim" in path.read_bytes()]
    for bridge in (search.optimizer, again.optimizer):
        assert bridge.study.trials[0].params == prior["params"]
    live = optuna.load_study(study_name="run", storage=f"sqlite:///{tmp_path}/study.db").trials
    assert [trial.user_attrs["trial_id"] for trial in live] == ["t00000", "t00001", "t00002"]
    assert all(trial.state.is_finished() and trial.intermediate_values for trial in live)
