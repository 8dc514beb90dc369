"""The live block on a terminal: best and running trials, counts of ended ones, and the estimated time left."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from tuning.record.journal import Trial, best_epoch, loss_like
from tuning.search.finalists import most_epochs, runs_to_make
from tuning.settings.config import SearchPlan
from tuning.settings.values import DEPTH_ALL
from tuning.settings.words import count

TOP = 3  # best trials shown
MOST_LINES = 15
LABEL, NAME = 10, 21  # columns of a line's label; most columns of a backbone's name
CURVE = 24  # most columns of a sparkline
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=*#"  # low to high
LEAST_ENDED = 3  # ended trials that the estimate of the time left needs
WARM_EPOCHS = 5  # epochs per slot before utilisation is shown


@dataclass
class Tally:
    """Running totals of a search, updated in time proportional to a trial's epochs, however many trials there are.

    Times are active seconds since the search began. `epochs` and `ended` don't count probes.
    """

    plan: SearchPlan
    slots: int | None = None  # number of concurrent trials, if it is fixed
    started: float = 0.0  # when the search was last started or resumed
    best: list[tuple[float, Trial]] = field(default_factory=list)  # of the search, with their loss, the lowest first
    ended: Counter[str] = field(default_factory=Counter)  # trials of the search by status
    lengths: Counter[int] = field(default_factory=Counter)  # ended trials of the search by their number of epochs
    finalists: int = 0  # finalist runs that ended
    epochs: int = 0  # since `started`, as are the next three
    seconds: float = 0.0  # summed over epochs, with those of probes
    began: float = math.inf  # when the first epoch started
    reported: float = 0.0  # when the last epoch ended
    _epochs: dict[str, int] = field(default_factory=dict)  # of trials that have not ended
    _ends: dict[str, tuple[str, int]] = field(default_factory=dict)  # status and epochs of ended trials of the search

    def take(self, trial: Trial) -> None:
        """Add what a trial has reported since the last call."""
        if trial.trial_id in self._ends:  # it was stopped, and has been promoted
            status, length = self._ends.pop(trial.trial_id)
            self._epochs[trial.trial_id] = length
            self.ended -= Counter([status])
            self.lengths -= Counter([length])
        for row in trial.rows[self._epochs.get(trial.trial_id, 0) :]:  # voided epochs count once
            if row["wall_s"] < self.started:  # maybe with another number of slots, or on another machine
                continue
            self.epochs += trial.origin != "probe"
            self.seconds += row["seconds"]
            self.began = min(self.began, row["wall_s"] - row["seconds"])
            self.reported = max(self.reported, row["wall_s"])
        self._epochs[trial.trial_id] = max(self._epochs.get(trial.trial_id, 0), len(trial.rows))
        top = None if trial.number is None else best_epoch(trial.rows, self.plan.metric)
        if top is not None:
            others = [entry for entry in self.best if entry[1] is not trial]
            mine = loss_like(self.plan.metric, top[self.plan.metric]), trial
            self.best = sorted([*others, mine], key=lambda entry: (entry[0], entry[1].trial_id))[:TOP]
        if trial.ended:
            del self._epochs[trial.trial_id]
            if trial.number is not None:
                self._ends[trial.trial_id] = trial.status or "", len(trial.rows)
                self.ended[trial.status or ""] += 1
                self.lengths[len(trial.rows)] += 1
            self.finalists += trial.origin == "finalist"

    def utilisation(self) -> float | None:
        """Return the share of the slots' time spent on epochs; None until each slot has had a few."""
        if self.slots is None or self.epochs < WARM_EPOCHS * self.slots:
            return None
        return min(1.0, self.seconds / (self.slots * max(self.reported - self.began, 1e-9)))

    def seconds_left(self, running: Sequence[Trial], wall_s: float) -> float | None:
        """Estimate the time left; None until enough trials have ended.

        It is the expected number of epochs left times the time per epoch so far, idle slots included. The number of
        epochs of a trial follows from the ended and the running trials, the latter as censored data.
        """
        if self.lengths.total() < LEAST_ENDED or not self.epochs:
            return None
        searched = [len(trial.rows) for trial in running if trial.number is not None]
        finalists = [len(trial.rows) for trial in running if trial.origin == "finalist"]
        shares = survival(self.lengths, searched, self.plan.epochs)
        fresh = self.plan.trials - self.lengths.total() - len(searched)
        left = fresh * sum(shares)
        left += sum(sum(shares[done:]) / shares[done] for done in searched if done < self.plan.epochs)
        total = left + sum(length * number for length, number in self.lengths.items()) + sum(searched)
        saved = self.plan.trials * self.plan.epochs - int(total)
        left += max(0, self._finalist_epochs(saved) - self.finalists * self.plan.epochs - sum(finalists))
        seconds = left * (self.reported - self.began) / self.epochs - (wall_s - self.reported)
        if self.plan.time_budget is not None:
            seconds = min(seconds, self.plan.time_budget - (wall_s - self.started))
        return max(0.0, seconds)

    def _finalist_epochs(self, saved: int) -> int:
        plan = self.plan
        if not (plan.finalists and plan.early_stopping):
            return 0
        cap = most_epochs(plan, saved)
        trials = [str(place) for place in range(plan.finalists + 1)]
        seeds = range(plan.finalist_seeds)
        runs = runs_to_make(trials, plan.finalists, seeds, asked=set(), epochs=plan.epochs, cap=cap)
        return len(runs) * plan.epochs


def survival(ended: Mapping[int, int], running: Sequence[int], epochs: int) -> list[float]:
    """Estimate the share of trials that continue after 0, 1, ... epochs (Kaplan & Meier 1958).

    `ended` has the number of ended trials by their epochs, `running` the epochs so far of each running trial.
    """
    shares, share = [], 1.0
    for done in range(epochs):
        at_risk = sum(number for length, number in ended.items() if length >= done)
        at_risk += sum(length >= done for length in running)
        share *= 1 - ended.get(done, 0) / at_risk if at_risk else 1.0
        shares.append(share)
    return shares


def block(
    tally: Tally, running: Sequence[Trial], wall_s: float, *, width: int = 80, height: int = 24, unicode: bool = True
) -> Text:
    """Return the block for a terminal of this width and height: at most `MOST_LINES` lines and half of the height."""
    room, metric = min(MOST_LINES, height // 2), tally.plan.metric
    lines = [status_line(tally, running, wall_s)]
    if room >= TOP + 5:
        best = _labelled("best", [f"{_named(trial)}  {metric} {abs(loss):.4f}" for loss, trial in tally.best])
        shown = running if len(running) <= room - 3 - len(best) else running[: room - 4 - len(best)]
        runs = _running_lines(shown, width - LABEL - 1, BLOCKS if unicode else ASCII_BLOCKS)
        runs += [f"and {len(running) - len(shown)} more"] * (len(shown) < len(running))
        ended = ", ".join(f"{number} {status}" for status, number in tally.ended.most_common())
        lines = ["", *best, *_labelled("running", runs), *_labelled("ended", [ended] * bool(ended)), *lines]
    return Text("\n".join(line[: width - 1] for line in lines), no_wrap=True, overflow="crop")


def status_line(tally: Tally, running: Sequence[Trial], wall_s: float) -> str:
    """Return the progress, the estimated time left and the utilisation of the slots."""
    parts = [f"{tally.ended.total()} of {count(tally.plan.trials, 'trial')}"]
    if tally.finalists or any(trial.origin == "finalist" for trial in running):
        parts.append(count(tally.finalists, "finalist run"))
    if (left := tally.seconds_left(running, wall_s)) is not None:
        parts.append(f"{about(left)} left")
    if (busy := tally.utilisation()) is not None:
        parts.append(f"slots {busy:.0%} in use")
    return f"{clock(wall_s):<{LABEL}}" + ", ".join(parts)


def _labelled(label: str, lines: Sequence[str]) -> list[str]:
    return [f"{label if place == 0 else '':<{LABEL}}{line}" for place, line in enumerate(lines)]


def _named(trial: Trial) -> str:
    """Return a trial's id and the main parts of its configuration, in columns."""
    config = trial.config
    rate = "probe" if trial.origin == "probe" else f"lr {config['learning_rate']:.1e}"
    name = config["backbone"]
    name = name if len(name) <= NAME else f"{name[: NAME - 2]}.."
    return f"{trial.trial_id:<7} {name:<{NAME}} {depth(config['unfreeze_depth']):<7} {rate:<10}"


def _running_lines(trials: Sequence[Trial], width: int, blocks: str) -> list[str]:
    """Return a line for each running trial, with a sparkline of its validation loss."""
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
    """Draw curves in characters on one logarithmic scale, in at most `columns` columns; an x is a missing value."""
    logs = [[None if value is None else math.log(max(value, 1e-6)) for value in curve] for curve in curves]
    known = [value for curve in logs for value in curve if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    step = max(high - low, 1e-9) / (len(blocks) - 1)
    marks = [
        "".join("x" if value is None else blocks[round((value - low) / step)] for value in curve) for curve in logs
    ]
    return [_thinned(mark, columns) for mark in marks]


def _thinned(mark: str, columns: int) -> str:
    """Keep evenly spaced characters, the first and the last among them."""
    if len(mark) <= columns:
        return mark
    steps = columns - 1
    return "".join(mark[round(place * (len(mark) - 1) / steps)] for place in range(columns)) if steps > 0 else ""


def about(seconds: float) -> str:
    """Format an estimated duration."""
    minutes = seconds / 60
    if minutes < 1.5:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    if minutes < 90:
        return f"about {minutes:.0f} min"
    return f"about {minutes / 60:.1f} h" if minutes < 48 * 60 else f"about {minutes / 60 / 24:.0f} days"


def clock(seconds: float) -> str:
    """Format seconds as hh:mm:ss."""
    return f"{seconds // 3600:02.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60 // 1:02.0f}"


def depth(unfreeze_depth: int) -> str:
    """Describe an unfreeze depth in a word or two."""
    return {0: "head", DEPTH_ALL: "all"}.get(unfreeze_depth, f"depth {unfreeze_depth}")
