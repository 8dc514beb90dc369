"""What a search shows while it runs."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from tuning.record.journal import Trial, best_epoch
from tuning.settings.config import SearchPlan, visible
from tuning.show.live import Tally, block, clock, depth, status_line

HOPELESS = 0.95  # of the class entropy: a probe with a higher loss is warned of
HEARTBEAT_SECONDS = 30.0  # between lines where the output is no terminal
REFRESH_PER_SECOND = 1
console = Console(highlight=False, soft_wrap=True, emoji=False)


class Progress:
    """A line for each trial that ends, and what runs: on a terminal in a block below, else in a line now and then.

    Args:
        plan: the settings.
        class_entropy: what guessing the classes' shares costs.
        slots: trials at once, if that number is fixed.
    """

    def __init__(self, plan: SearchPlan, class_entropy: float, slots: int | None = None):
        self._plan, self._class_entropy = plan, class_entropy
        self._tally = Tally(plan, slots)
        self._draws = sys.stdout.isatty() and console.is_interactive
        self._said_at = time.monotonic()
        self._lock = threading.Lock()  # the terminal is drawn in a thread of its own

    @contextmanager
    def watching(self, search: Any) -> Iterator[None]:
        """Show a search while the block runs; a terminal gets its cursor back however that ends."""
        self._tally.started = search.started_wall_s
        for trial in search.record.trials.values():  # a resumed search has trials to begin with
            self._tally.take(trial)
        if not self._draws:
            yield
            return
        with Live(
            get_renderable=lambda: self._block(search),
            console=console,
            refresh_per_second=REFRESH_PER_SECOND,
            transient=True,
            redirect_stderr=sys.stderr.isatty(),
            vertical_overflow="crop",
        ):
            yield

    def _block(self, search: Any) -> Text:
        unicode = console.encoding.startswith("utf")
        with self._lock:
            running = list(search.running.values())
            return block(
                self._tally, running, search.journal.wall_s, width=console.width, height=console.height, unicode=unicode
            )

    def __call__(self, search: Any, trial: Trial) -> None:
        """Take in a trial that has reported an epoch or ended."""
        with self._lock:
            self._tally.take(trial)
        tell = {"probe": self._probe, "finalist": self._finalist}.get(trial.origin, self._searched)
        if trial.status != "running":
            tell(search, trial)
        elif not self._draws and time.monotonic() - self._said_at > HEARTBEAT_SECONDS:
            self._heartbeat(search)

    def _searched(self, search: Any, trial: Trial) -> None:
        planned = self._plan.trials
        count = f"{clock(search.journal.wall_s)}  {self._tally.ended.total():>{len(str(planned))}}/{planned}"
        best = "  [bold]best so far[/bold]" if self._tally.best and self._tally.best[0][1] is trial else ""
        ending = f"{trial.trial_id} {trial.status:<10} {self._plan.metric} {self._value(trial):<20}"
        self._say(f"{count}  {ending}  {describe(trial.config)}{best}")

    def _heartbeat(self, search: Any) -> None:
        running = list(search.running.values())
        best = [f"best {self._plan.metric} {abs(loss):.4f} ({trial.trial_id})" for loss, trial in self._tally.best[:1]]
        now = "running: " + ", ".join(f"{trial.trial_id} {len(trial.rows)} epochs" for trial in running)
        self._say("; ".join([status_line(self._tally, running, search.journal.wall_s), *best, now]))

    def _value(self, trial: Trial) -> str:
        row = best_epoch(trial.rows, self._plan.metric)
        return "-" if row is None else f"{row[self._plan.metric]:.4f} at epoch {row['epoch']}/{len(trial.rows)}"

    def _probe(self, search: Any, trial: Trial) -> None:
        if not trial.rows:
            self._say(f"probe     {trial.config['backbone']} {trial.status}: {plain(trial.reason)}")
            return
        row = trial.rows[-1]
        if row["val_loss"] is None:
            self._say(f"probe     {trial.config['backbone']}: its loss is not finite")
            return
        hopeless = row["val_loss"] > HOPELESS * self._class_entropy
        warning = ": hardly better than guessing the classes' shares" if hopeless else ""
        measured = f"val_loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.2f}"
        self._say(f"probe     {trial.config['backbone']} {measured}{warning}")

    def _finalist(self, search: Any, trial: Trial) -> None:
        self._say(f"finalist  {trial.finalist_of} seed {trial.config['seed']} {self._plan.metric} {self._value(trial)}")

    def _say(self, line: str) -> None:
        console.print(line)
        self._said_at = time.monotonic()


def plain(value: object) -> str:
    """What a user or a file has named, as text in what the console prints: one line, and no markup."""
    return escape(visible(value))


def describe(config: dict[str, Any]) -> str:
    """A configuration in a few words."""
    unfrozen = depth(config["unfreeze_depth"])
    return f"{config['backbone']} {unfrozen} lr {config['learning_rate']:.1e} aug {config['augmentation']}"


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if value is None or pd.isna(value) else f"{value:.4f}"
