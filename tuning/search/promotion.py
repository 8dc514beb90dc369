"""Which stopped trials continue: those that are among the best of their rung after all, or that fill spare time.

ASHA's own variant (Li et al. 2020, https://arxiv.org/abs/1810.05934) pauses all trials at a rung and promotes the best
of them; here a trial that leads its rung does not wait, and a stopped one is promoted once it does. That stopped trials
go on from their checkpoints is freeze-thaw's idea (Swersky et al. 2014, https://arxiv.org/abs/1406.3896).
"""

import math
from collections.abc import Callable, Iterable

from tuning.record.journal import Record, Trial
from tuning.search.finalists import most_epochs, saved_before_promotions
from tuning.search.stopping import Rungs, as_loss
from tuning.settings.config import SearchPlan


def promotable(rungs: Rungs, record: Record) -> Trial | None:
    """Return the best stopped trial that would continue if it were judged now, of the last rung that has one."""
    for rung in reversed(rungs.rungs):
        for trial_id in rungs.passing(rung):
            trial = record.trials[trial_id]
            if trial.status == "stopped" and trial.decisions[-1]["rung"] == rung:
                return trial
    return None


def best_stopped(record: Record, plan: SearchPlan, seconds: float, has_state: Callable[[Trial], bool]) -> Trial | None:
    """Return the stopped trial that got furthest, the best of equals, of those that may end within some seconds.

    One without a state to resume from would be trained again.
    """
    stopped = (trial for trial in record.trials.values() if trial.status == "stopped")
    fitting = [trial for trial in stopped if 0 < seconds_left(trial, plan, has_state(trial)) <= seconds]
    return min(fitting, key=lambda trial: _order(trial, plan), default=None)


def _order(trial: Trial, plan: SearchPlan) -> tuple[int, float]:
    last = trial.decisions[-1]
    value = as_loss(plan, last["value"])
    return -last["rung"], math.inf if value is None else value


def seconds_left(trial: Trial, plan: SearchPlan, resumes: bool = True) -> float:
    """Estimate how long a trial takes to its last epoch, from where it is or from the first; 0 if it has none yet."""
    seconds = [row["seconds"] for row in trial.rows]
    epochs = plan.epochs - len(seconds) * resumes
    return epochs * math.fsum(seconds) / len(seconds) if seconds else 0.0


def spare_seconds(record: Record, plan: SearchPlan, running: Iterable[Trial], budget_left: float, slots: int) -> float:
    """Return how long a stopped trial may go on, now that no trial is left to suggest.

    While others run, as long as they may. With a time budget, of which `budget_left` seconds are left, also for as long
    as the finalists' runs leave.
    """
    spare = max((seconds_left(trial, plan) for trial in running), default=0.0)
    seconds = [row["seconds"] for trial in record.trials.values() if trial.number is not None for row in trial.rows]
    if math.isinf(budget_left) or not seconds:
        return spare
    finalists = most_epochs(plan, saved_before_promotions(record, plan)) if plan.finalists else 0
    return min(budget_left, max(spare, budget_left - finalists * math.fsum(seconds) / len(seconds) / slots))
