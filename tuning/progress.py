"""What a search shows while it runs."""

import time
from typing import Any

import pandas as pd
from rich.console import Console

from tuning import tables
from tuning.config import DEPTH_ALL, SearchPlan

HOPELESS = 0.95  # of the class entropy: a probe with a higher loss is warned of
HEARTBEAT_SECONDS = 30.0  # between lines where the output is no terminal
console = Console(highlight=False, soft_wrap=True)


class Progress:
    """A line for each trial that ends, and what runs: on a terminal as a status line, else now and then."""

    def __init__(self, plan: SearchPlan, class_entropy: float):
        self._plan, self._class_entropy = plan, class_entropy
        self._status = console.status("") if console.is_terminal else None
        self._best: tuple[float, str] | None = None
        self._begun = False
        self._said_at = time.monotonic()

    def __call__(self, search: Any, trial: tables.Trial) -> None:
        """Take in a trial that has reported an epoch or ended."""
        if trial.origin == "probe":
            self._probe(trial)
            return
        if trial.origin == "finalist":
            self._finalist(trial)
            return
        everything = [other for other in search.record.trials.values() if other.number is not None]
        ended = sum(other.ended for other in everything)
        clock = time.strftime("%H:%M:%S", time.gmtime(search.journal.wall_s))
        count = f"{clock}  {ended:>{len(str(self._plan.trials))}}/{self._plan.trials}"
        for other in [trial] if self._begun else everything:  # a resumed search has trials to begin with
            row = tables.best_epoch(other.rows, self._plan.metric)
            if row is not None:
                mine = (tables.loss_like(self._plan.metric, row[self._plan.metric]), other.trial_id)
                self._best = min(self._best or mine, mine)
        self._begun = True
        row = tables.best_epoch(trial.rows, self._plan.metric)
        if trial.status != "running":
            value = "-" if row is None else f"{row[self._plan.metric]:.4f} at epoch {row['epoch']}/{len(trial.rows)}"
            mark = "  [bold]best so far[/bold]" if self._best and self._best[1] == trial.trial_id else ""
            ending = f"{trial.trial_id} {trial.status:<10} {self._plan.metric} {value:<20}"
            self._say(f"{count}  {ending}  {describe(trial.config)}{mark}")
        best = "" if self._best is None else f"best {self._plan.metric} {abs(self._best[0]):.4f} ({self._best[1]}), "
        running = [other for other in everything if other.status == "running"]
        now = f"{best}running: " + ", ".join(f"{other.trial_id} {len(other.rows)} epochs" for other in running)
        if self._status is not None:
            self._status.update(f"{count}  {now}")
            (self._status.start if running else self._status.stop)()
        elif running and time.monotonic() - self._said_at > HEARTBEAT_SECONDS:
            self._say(f"{count}  {now}")

    def _probe(self, trial: tables.Trial) -> None:
        if not trial.rows:
            self._say(f"probe     {trial.config['backbone']} {trial.status}: {trial.reason}")
            return
        row = trial.rows[-1]
        if row["val_loss"] is None:
            self._say(f"probe     {trial.config['backbone']}: its loss is not finite")
            return
        hopeless = row["val_loss"] > HOPELESS * self._class_entropy
        warning = ": hardly better than guessing the classes' shares" if hopeless else ""
        measured = f"val_loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.2f}"
        self._say(f"probe     {trial.config['backbone']} {measured}{warning}")

    def _finalist(self, trial: tables.Trial) -> None:
        row = tables.best_epoch(trial.rows, self._plan.metric)
        if trial.status != "running":
            value = "-" if row is None else f"{row[self._plan.metric]:.4f} at epoch {row['epoch']}/{len(trial.rows)}"
            self._say(f"finalist  {trial.finalist_of} seed {trial.config['seed']} {self._plan.metric} {value}")

    def stop(self) -> None:
        """Give the terminal its cursor back."""
        if self._status is not None:
            self._status.stop()

    def _say(self, line: str) -> None:
        console.print(line)
        self._said_at = time.monotonic()


def describe(config: dict[str, Any]) -> str:
    """A configuration in a few words."""
    unfrozen = depth(config["unfreeze_depth"])
    return f"{config['backbone']} {unfrozen} lr {config['learning_rate']:.1e} aug {config['augmentation']}"


def depth(unfreeze_depth: int) -> str:
    """How much is unfrozen, in a word or two."""
    return {0: "head", DEPTH_ALL: "all"}.get(unfreeze_depth, f"depth {unfreeze_depth}")


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if value is None or pd.isna(value) else f"{value:.4f}"
