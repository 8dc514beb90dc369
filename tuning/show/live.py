"""The block that a terminal shows below a search's lines: best and running trials, ends, and how long it will take."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from tuning.record.journal import Trial, best_epoch, loss_like
from tuning.search.finalists import most_epochs, runs_to_make
from tuning.settings.config import DEPTH_ALL, SearchPlan

TOP = 3  # best trials shown
MOST_LINES = 15
LABEL, NAME = 10, 21  # columns of a line's label, and of a backbone at most
CURVE = 24  # columns of a spark line, at most
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=*#"  # low to high
LEAST_ENDED = 3  # trials from whose lengths the time left is told
WARM_EPOCHS = 5  # of each slot, after which its use is told


@dataclass
class Tally:
    """What a search's trials have come to. Each report costs as much as its trial has epochs, however many there are.

    Epochs and ends are those of searched trials and finalists' runs; a probe is neither.
    """

    plan: SearchPlan
    slots: int | None = None  # trials at once, if that number is fixed
    started: float = 0.0  # when this start of the search began; as below, in active seconds since the search did
    best: list[tuple[float, Trial]] = field(default_factory=list)  # of the searched, less being better
    ended: Counter[str] = field(default_factory=Counter)  # searched trials by status
    lengths: Counter[int] = field(default_factory=Counter)  # the same by epochs run
    finalists: int = 0  # runs of theirs that ended
    epochs: int = 0  # of this start, as are the next three
    seconds: float = 0.0  # that they took, with those of probes
    began: float = math.inf  # when the first epoch did
    reported: float = 0.0  # when the last one ended
    _epochs: dict[str, int] = field(default_factory=dict)  # of trials that have not ended

    def take(self, trial: Trial) -> None:
        """Take in what a trial has reported since it was last taken in."""
        for row in trial.rows[self._epochs.get(trial.trial_id, 0) :]:  # voided epochs count once
            if row["wall_s"] < self.started:  # with other slots, maybe, or on another machine
                continue
            self.epochs += trial.origin != "probe"
            self.seconds += row["seconds"]
            self.began = min(self.began, row["wall_s"] - row["seconds"])
            self.reported = max(self.reported, row["wall_s"])
        self._epochs[trial.trial_id] = max(self._epochs.get(trial.trial_id, 0), len(trial.rows))
        if trial.number is not None:
            self._rank(trial)
        if trial.ended:
            del self._epochs[trial.trial_id]
            if trial.number is not None:
                self.ended[trial.status or ""] += 1
                self.lengths[len(trial.rows)] += 1
            self.finalists += trial.origin == "finalist"

    def _rank(self, trial: Trial) -> None:
        row = best_epoch(trial.rows, self.plan.metric)
        if row is not None:
            others = [entry for entry in self.best if entry[1] is not trial]
            mine = loss_like(self.plan.metric, row[self.plan.metric]), trial
            self.best = sorted([*others, mine], key=lambda entry: (entry[0], entry[1].trial_id))[:TOP]

    def utilisation(self) -> float | None:
        """The share of the slots' time that went into epochs; null until each has had a few."""
        if self.slots is None or self.epochs < WARM_EPOCHS * self.slots:
            return None
        return min(1.0, self.seconds / (self.slots * max(self.reported - self.began, 1e-9)))

    def seconds_left(self, running: Sequence[Trial], wall_s: float) -> float | None:
        """Roughly how long the search will take from here; null until enough trials have ended to tell.

        The epochs left, at the time that an epoch took so far, idle slots included. How long trials are is told from
        those that ended and those that run (Kaplan & Meier 1958): of the latter it is known how far they got.
        """
        if self.lengths.total() < LEAST_ENDED or not self.epochs:
            return None
        searched = [len(trial.rows) for trial in running if trial.number is not None]
        finalists = [len(trial.rows) for trial in running if trial.origin == "finalist"]
        going = survival(self.lengths, searched, self.plan.epochs)
        fresh = self.plan.trials - self.lengths.total() - len(searched)
        left = fresh * sum(going) + sum(sum(going[done:]) / going[done] for done in searched if done < self.plan.epochs)
        total = left + sum(length * count for length, count in self.lengths.items()) + sum(searched)
        left += max(0, self._finalist_epochs(int(total)) - self.finalists * self.plan.epochs - sum(finalists))
        seconds = left * (self.reported - self.began) / self.epochs - (wall_s - self.reported)
        if self.plan.time_budget is not None:
            seconds = min(seconds, self.plan.time_budget - (wall_s - self.started))
        return max(0.0, seconds)

    def _finalist_epochs(self, searched: int) -> int:
        plan = self.plan
        if not (plan.finalists and plan.early_stopping):
            return 0
        cap = most_epochs(plan, searched)
        trials = [str(place) for place in range(plan.finalists + 1)]
        seeds = range(plan.finalist_seeds)
        runs = runs_to_make(trials, plan.finalists, seeds, asked=set(), epochs=plan.epochs, cap=cap)
        return len(runs) * plan.epochs


def survival(ended: Mapping[int, int], running: Sequence[int], epochs: int) -> list[float]:
    """The share of trials that go on after 0, 1, ... epochs, as far as it is known, by Kaplan and Meier.

    Args:
        ended: trials by the epochs that they ran.
        running: epochs of each trial that runs.
        epochs: of a trial that nothing ends early.
    """
    shares, share = [], 1.0
    for done in range(epochs):
        there = sum(count for length, count in ended.items() if length >= done)
        there += sum(length >= done for length in running)
        share *= 1 - ended.get(done, 0) / there if there else 1.0
        shares.append(share)
    return shares


# ---- the block --------------------------------------------------------------------------------------------------


def block(
    tally: Tally, running: Sequence[Trial], wall_s: float, *, width: int = 80, height: int = 24, unicode: bool = True
) -> Text:
    """What is shown of a search: at most `MOST_LINES` lines, and half of the terminal's height.

    Args:
        tally: of its trials.
        running: those that run.
        wall_s: active seconds since the search began.
        width: of the terminal, in columns.
        height: of the terminal, in lines.
        unicode: whether it can show more than ASCII.
    """
    room = min(MOST_LINES, height // 2)
    lines = [status_line(tally, running, wall_s)]
    if room >= TOP + 5:
        best = _labelled("best", [_best_line(loss, trial, tally.plan.metric) for loss, trial in tally.best])
        shown = running if len(running) <= room - 3 - len(best) else running[: room - 4 - len(best)]
        runs = _running_lines(shown, tally.plan, width - LABEL - 1, BLOCKS if unicode else ASCII_BLOCKS)
        runs += [f"and {len(running) - len(shown)} more"] * (len(shown) < len(running))
        ended = ", ".join(f"{count} {status}" for status, count in tally.ended.most_common())
        lines = ["", *best, *_labelled("running", runs), *_labelled("ended", [ended] * bool(ended)), *lines]
    return Text("\n".join(line[: width - 1] for line in lines), no_wrap=True, overflow="crop")


def status_line(tally: Tally, running: Sequence[Trial], wall_s: float) -> str:
    """How far a search is, how long it will take, and how busy it keeps its slots."""
    parts = [f"{tally.ended.total()} of {tally.plan.trials} trials"]
    if tally.finalists or any(trial.origin == "finalist" for trial in running):
        parts.append(f"{tally.finalists} finalists' runs")
    if (left := tally.seconds_left(running, wall_s)) is not None:
        parts.append(f"{about(left)} left")
    if (busy := tally.utilisation()) is not None:
        parts.append(f"slots {busy:.0%} in use")
    return f"{clock(wall_s):<{LABEL}}" + ", ".join(parts)


def _labelled(label: str, lines: Sequence[str]) -> list[str]:
    return [f"{label if place == 0 else '':<{LABEL}}{line}" for place, line in enumerate(lines)]


def _best_line(loss: float, trial: Trial, metric: str) -> str:
    return f"{_named(trial)}  {metric} {abs(loss):.4f}"


def _named(trial: Trial) -> str:
    """A trial's id and what of its configuration fits, in columns."""
    config = trial.config
    rate = "probe" if trial.origin == "probe" else f"lr {config['learning_rate']:.1e}"
    name = config["backbone"]
    name = name if len(name) <= NAME else f"{name[: NAME - 2]}.."
    return f"{trial.trial_id:<7} {name:<{NAME}} {depth(config['unfreeze_depth']):<7} {rate:<10}"


def _running_lines(trials: Sequence[Trial], plan: SearchPlan, width: int, blocks: str) -> list[str]:
    """A line for each trial that runs, with its validation loss by epoch; all curves have one scale."""
    curves = [[row["val_loss"] for row in list(trial.rows)] for trial in trials]
    counts = [f"{len(curve)}/{trial.config['epochs']}" for curve, trial in zip(curves, trials, strict=True)]
    counted = max(map(len, counts), default=0)
    heads = [_named(trial) for trial in trials]
    columns = min(CURVE, width - max(map(len, heads), default=0) - counted - 3)
    sparks = spark_lines(curves, columns, blocks)
    return [
        f"{head}  {spark:<{max(columns, 0)}} {count:>{counted}}"
        for head, spark, count in zip(heads, sparks, counts, strict=True)
    ]


def spark_lines(curves: Sequence[Sequence[float | None]], columns: int, blocks: str) -> list[str]:
    """Curves in characters of one logarithmic scale, thinned out to at most so many columns.

    A missing value is a `x`.
    """
    logs = [[None if value is None else math.log(max(value, 1e-6)) for value in curve] for curve in curves]
    there = [value for curve in logs for value in curve if value is not None]
    low, high = min(there, default=0.0), max(there, default=0.0)
    step = max(high - low, 1e-9) / (len(blocks) - 1)
    marks = [
        "".join("x" if value is None else blocks[round((value - low) / step)] for value in curve) for curve in logs
    ]
    return ["".join(mark[place] for place in _thinned(len(mark), columns)) for mark in marks]


def _thinned(count: int, columns: int) -> list[int]:
    """Indices, evenly spaced from the first to the last."""
    if count <= columns:
        return list(range(count))
    return [round(place * (count - 1) / (columns - 1)) for place in range(columns)] if columns > 1 else []


def about(seconds: float) -> str:
    """A duration as roughly as it is known."""
    minutes = seconds / 60
    if minutes < 1.5:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    if minutes < 90:
        return f"about {minutes:.0f} min"
    return f"about {minutes / 60:.1f} h" if minutes < 48 * 60 else f"about {minutes / 60 / 24:.0f} days"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return f"{seconds // 3600:02.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60 // 1:02.0f}"


def depth(unfreeze_depth: int) -> str:
    """How much is unfrozen, in a word or two."""
    return {0: "head", DEPTH_ALL: "all"}.get(unfreeze_depth, f"depth {unfreeze_depth}")
