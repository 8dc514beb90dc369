"""The lines and the live block that a search prints while it runs."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from tuning.insight.guessing import GUESS
from tuning.record.journal import PROMOTED, Trial, best_epoch
from tuning.settings.config import SearchPlan, visible
from tuning.settings.words import count
from tuning.show.live import Tally, block, clock, depth, status_line

LIMIT = 1.96  # standard errors; 2.5% of guesses are further up, 3% with the penalty chosen on the same images
HEARTBEAT_SECONDS = 30.0  # between status lines if the output is not a terminal
REFRESH_PER_SECOND = 1
console = Console(highlight=False, soft_wrap=True, emoji=False, force_jupyter=False)  # else each line is a widget


class Progress:
    """Print a line for each ended trial; show running trials in a live block on a terminal, else in a line at times.

    Args:
        plan: settings of the search.
        class_entropy: loss of always predicting the class frequencies.
        guess_error: standard error of a guess's AUROC on the validation set.
        slots: number of concurrent trials, if it is fixed.
    """

    def __init__(self, plan: SearchPlan, class_entropy: float, guess_error: float, slots: int | None = None):
        self._plan, self._class_entropy, self._guess_error = plan, class_entropy, guess_error
        self._tally = Tally(plan, slots)
        self._live = sys.stdout.isatty() and console.is_interactive
        self._printed_at = time.monotonic()
        self._lock = threading.Lock()  # the block is refreshed in a thread of its own

    @contextmanager
    def watching(self, search: Any) -> Iterator[None]:
        """Show a search while the context lasts; the terminal's cursor is restored however it ends."""
        self._tally.started = search.started_wall_s
        for trial in search.record.trials.values():  # a resumed search has trials to begin with
            self._tally.take(trial)
        if not self._live:
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
        """Show a trial that has reported an epoch or ended."""
        with self._lock:
            self._tally.take(trial)
        if trial.status != "running":
            line = {"probe": self._probe, "finalist": self._finalist}.get(trial.origin, self._searched)(search, trial)
        elif not self._live and time.monotonic() - self._printed_at > HEARTBEAT_SECONDS:
            line = self._heartbeat(search)
        else:
            return
        console.print(line)
        self._printed_at = time.monotonic()

    def _searched(self, search: Any, trial: Trial) -> str:
        planned = self._plan.trials
        number = f"{clock(search.journal.wall_s)}  {self._tally.ended.total():>{len(str(planned))}}/{planned}"
        promoted = "  promoted" if any(made["verdict"] == PROMOTED for made in trial.decisions) else ""
        best = "  [bold]best so far[/bold]" if self._tally.best and self._tally.best[0][1] is trial else ""
        ending = f"{trial.trial_id} {trial.status:<10} {self._plan.metric} {self._value(trial):<20}"
        config = trial.config
        described = f"{config['backbone']} {depth(config['unfreeze_depth'])} lr {config['learning_rate']:.1e}"
        return f"{number}  {ending}  {described} aug {config['augmentation']}{promoted}{best}"

    def _heartbeat(self, search: Any) -> str:
        running = list(search.running.values())
        best = [f"best {self._plan.metric} {abs(loss):.4f} ({trial.trial_id})" for loss, trial in self._tally.best[:1]]
        now = "running: " + ", ".join(f"{trial.trial_id} {count(len(trial.rows), 'epoch')}" for trial in running)
        return "; ".join([status_line(self._tally, running, search.journal.wall_s), *best, now])

    def _value(self, trial: Trial) -> str:
        row = best_epoch(trial.rows, self._plan.metric)
        return "-" if row is None else f"{row[self._plan.metric]:.4f} at epoch {row['epoch']}/{len(trial.rows)}"

    def _probe(self, search: Any, trial: Trial) -> str:
        start = f"probe     {trial.config['backbone']}"
        if not trial.rows:
            return f"{start} {trial.status}: {plain(trial.reason)}"
        row = trial.rows[-1]
        if row["val_loss"] is None:
            return f"{start}: the loss is not finite"
        auroc, warning = row["val_auroc"], ""
        if auroc is not None and auroc <= GUESS + LIMIT * self._guess_error:
            warning = f": AUROC {auroc:.2f}, not significantly better than guessing"
        elif auroc is not None and row["val_loss"] >= self._class_entropy:
            warning = f": AUROC {auroc:.2f}, it tells the classes apart, but its probabilities are overconfident"
        return f"{start} val_loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.2f}{warning}"

    def _finalist(self, search: Any, trial: Trial) -> str:
        return f"finalist  {trial.finalist_of} seed {trial.config['seed']} {self._plan.metric} {self._value(trial)}"


def plain(value: object) -> str:
    """Escape a name that a user or a file has given for the console: one line, no markup."""
    return escape(visible(value))
