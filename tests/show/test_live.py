"""The block below a running search's lines, made from records and printed to files as narrow as terminals are."""

import io
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from runs import make_record

from tuning.record.journal import best_epoch
from tuning.settings.config import SearchPlan
from tuning.show.live import ASCII_BLOCKS, BLOCKS, MOST_LINES, Tally, about, block, spark_lines, survival


def tallied(trials, *, running, slots=2, epochs=8, **settings):
    """A search of so many trials, of which the last few run."""
    record = make_record(trials=trials, epochs=epochs, running=running)
    tally = Tally(SearchPlan(name="x", trials=trials, epochs=epochs, metric="val_loss", **settings), slots)
    for trial in record.trials.values():
        tally.take(trial)
    return record, tally, [trial for trial in record.trials.values() if trial.status == "running"]


def printed(renderable, width=80):
    file = io.StringIO()
    Console(file=file, width=width).print(renderable)
    return file.getvalue().splitlines()


def test_best_trials_running_ones_ends_and_time_left():
    record, tally, running = tallied(40, running=2)
    *lines, last = printed(block(tally, running, 3723.0))
    losses = {trial.trial_id: best_epoch(trial.rows, "val_loss") for trial in record.trials.values()}
    best = sorted((row["val_loss"], trial_id) for trial_id, row in losses.items() if row)[:3]
    shown = [line for line in lines if "val_loss" in line]
    assert len(shown) == 3 and all(
        trial_id in line and line.endswith(f"{loss:.4f}") for (loss, trial_id), line in zip(best, shown, strict=True)
    )
    (first, second) = [line for line in lines if "t00038" in line or "t00039" in line][-2:]
    assert first.startswith("running   t00038") and first.endswith(f"{len(running[0].rows)}/8")
    assert set(BLOCKS) & set(first + second)
    statuses = [trial.status for trial in record.trials.values()]
    assert f"{statuses.count('stopped')} stopped" in "\n".join(lines)
    assert last.startswith("01:02:03  38 of 40 trials, about ") and " left, slots " in last and "% in use" in last


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 40), (50, 24), (80, 10), (20, 3)])
@pytest.mark.parametrize("count", [0, 2, 40])
def test_it_fits_and_stays_small(width, height, count):
    _, tally, running = tallied(60, running=count, slots=max(count, 1))
    lines = printed(block(tally, running, 60.0, width=width, height=height), width)
    assert len(lines) <= max(1, min(MOST_LINES, height // 2)) and max(map(len, lines)) < width
    assert lines[-1].startswith("00:01:00  ") and " of 60" in lines[-1]
    assert any(line.endswith(" more") for line in lines) == (count == 40 and height > 16 and width > 30)


def test_a_terminal_without_unicode_gets_ascii():
    _, tally, running = tallied(20, running=4)
    text = "\n".join(printed(block(tally, running, 60.0, unicode=False)))
    assert text.isascii() and set(ASCII_BLOCKS) & set(text)


def test_before_anything_has_been_reported():
    tally = Tally(SearchPlan(name="x", trials=5), 2)
    lines = printed(block(tally, [], 3.0))
    assert lines == ["", "00:00:03  0 of 5 trials"]


def test_probes_and_finalists_are_no_trials_of_the_search():
    record = make_record(trials=9, epochs=4, finalists=True)
    finalist = record.trials["f00014"]
    finalist.status, finalist.rows = "running", finalist.rows[:2]
    tally = Tally(SearchPlan(name="x", trials=9, epochs=4), 2)
    for trial in record.trials.values():
        tally.take(trial)
    lines = printed(block(tally, [finalist], 60.0))
    assert "9 of 9 trials, 14 finalist runs" in lines[-1] and tally.ended.total() == 9
    assert any(line.startswith("running   f00014") and line.endswith("2/4") for line in lines)
    assert not any("f0" in line for line in lines if "val_loss" in line)


def test_a_promoted_trial_counts_once():
    record = make_record(trials=9, epochs=4)
    tally = Tally(SearchPlan(name="x", trials=9, epochs=4), 2)
    trial = next(trial for trial in record.trials.values() if trial.status == "stopped")
    rows, trial.rows = trial.rows, trial.rows[:1]
    for other in record.trials.values():
        tally.take(other)
    stopped, epochs = tally.ended["stopped"], tally.epochs
    trial.status = "running"
    tally.take(trial)
    assert tally.ended["stopped"] == stopped - 1 and tally.ended.total() == 8 and tally.epochs == epochs
    trial.status, trial.rows = "completed", [*rows[:1], *(rows[0] for _ in range(3))]
    tally.take(trial)
    assert tally.ended.total() == 9 and tally.epochs == epochs + 3 and tally.lengths.total() == 9


def test_a_diverged_epoch_is_a_cross_and_one_scale_is_for_all():
    assert spark_lines([[1.0, None], [math.e**7]], 10, BLOCKS) == ["▁x", "█"]
    assert spark_lines([[math.e**k for k in range(8)]], 10, BLOCKS) == [BLOCKS]
    assert spark_lines([[1.0, 1.0, 1.0]], 10, BLOCKS) == ["▁▁▁"] and spark_lines([[]], 10, BLOCKS) == [""]


@given(st.lists(st.lists(st.none() | st.floats(0, 1e30), max_size=60), max_size=5), st.integers(-3, 30))
def test_curves_never_exceed_their_columns(curves, columns):
    for line, curve in zip(spark_lines(curves, columns, BLOCKS), curves, strict=True):
        assert len(line) == (len(curve) if len(curve) <= columns else max(columns, 0) if columns > 1 else 0)


def test_survival_is_told_from_trials_that_still_run_too():
    assert survival({1: 2, 4: 2}, [], 4) == [1, 0.5, 0.5, 0.5]
    assert survival({1: 2}, [1, 1], 4) == [1, 0.5, 0.5, 0.5]  # two of four went on, and how far is not known
    assert survival({0: 1}, [0], 2) == [0.5, 0.5]
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(0.3, 2000), 8)
    seen = rng.random(2000) < 0.5  # the others have been watched for a while only
    watched = [int(rng.integers(0, length)) for length in lengths[~seen]]
    counts = {length: int((lengths[seen] == length).sum()) for length in range(1, 9)}
    assert len(watched) > 900 and sum(survival(counts, watched, 8)) == pytest.approx(lengths.mean(), abs=0.9)
    everything = {length: int((lengths == length).sum()) for length in range(1, 9)}
    assert sum(survival(everything, [], 8)) == pytest.approx(lengths.mean())


def test_the_time_left_is_the_epochs_left_at_their_pace():
    record = make_record(trials=10, epochs=8, running=0)
    tally = Tally(SearchPlan(name="x", trials=20, epochs=8, finalists=0), 1)
    for trial in record.trials.values():
        tally.take(trial)
    took = tally.reported - tally.began
    assert tally.seconds_left([], tally.reported) == pytest.approx(took)  # ten more like them
    assert tally.seconds_left([], tally.reported + 5) == pytest.approx(took - 5)
    budget = Tally(SearchPlan(name="x", trials=20, epochs=8, time_budget=100.0), 1, started=tally.reported - 60)
    for trial in record.trials.values():
        budget.take(trial)
    assert budget.epochs < tally.epochs and budget.seconds_left([], tally.reported) <= 40
    unknown = Tally(SearchPlan(name="x", trials=20, epochs=8), 1)
    unknown.take(record.trials["t00000"])
    assert unknown.seconds_left([], 60.0) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(2, "about 10 s"), (47, "about 50 s"), (600, "about 10 min"), (9000, "about 2.5 h"), (360_000, "about 4 days")],
)
def test_durations_are_told_as_roughly_as_they_are_known(seconds, words):
    assert about(seconds) == words


def test_what_a_report_and_a_block_cost_does_not_grow_with_the_search():
    """Counted in rows read, not in seconds: a machine may be busy."""
    reads = []
    for trials in (20, 400):
        _, tally, running = tallied(trials, running=2)
        rows = Counting(running[0].rows)
        running[0].rows = rows
        tally.take(running[0])
        block(tally, running, time.monotonic())
        reads.append(rows.read)
    assert len(tally._epochs) == 2 and len(tally.best) == 3 and len(tally.lengths) <= 9
    assert max(reads) <= 3 * 8


class Counting(list):
    """Rows that count how often they are read."""

    read = 0

    def __iter__(self):
        self.read += len(self)
        return super().__iter__()

    def __getitem__(self, place):
        self.read += 1
        return super().__getitem__(place)
