"""The bridge to Optuna: asks for parameters and tells every end, so that no trial stays running in the study."""

import warnings
from typing import Any

import optuna
from optuna.trial import TrialState

from tuning.space import Space, suggest
from tuning.tables import Trial, best_epoch, loss_like


class Optimizer:
    """An in-memory study, rebuilt from the journal at each start.

    Ended trials are told by status: completed and converged ones with their best value; stopped ones as PRUNED with the
    value at each epoch, which TPE ranks below the complete ones, the later stopped first; diverged and out-of-memory
    ones as PRUNED without a value, which TPE ranks last, so that their region is avoided; failed and interrupted ones
    as FAIL, which it ignores. Each ask has a fresh sampler seeded by (seed, trial number): a resumed search asks the
    same.
    """

    def __init__(self, space: Space, *, seed: int, metric: str):
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line per told trial otherwise
        self.space = space
        self.seed = seed
        self.metric = metric
        self.study = optuna.create_study(direction="minimize")
        self._open: dict[int, optuna.Trial] = {}  # our trial number -> the study's running trial

    def ask(self, number: int, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Parameters for the trial with this number: `params` where given, else suggested."""
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):  # group=True
            self.study.sampler = optuna.samplers.TPESampler(
                multivariate=True, group=True, constant_liar=True, seed=(self.seed * 1_000_003 + number) % 2**32
            )
        if params is not None:
            self.study.enqueue_trial(params)
        self._open[number] = trial = self.study.ask()
        return suggest(self.space, trial)

    def tell(self, trial: Trial) -> None:
        """Tell how a trial ended."""
        asked = self._open.pop(trial.number)
        state, value, intermediate = self._outcome(trial)
        for epoch, loss in intermediate.items():
            asked.report(loss, epoch)
        self.study.tell(asked, value if state == TrialState.COMPLETE else None, state)

    def remember(self, trial: Trial) -> None:
        """Take in a trial of an earlier start; one that has not ended is left open."""
        if not trial.ended:
            self.ask(trial.number, trial.params)
            return
        fixed = optuna.trial.FixedTrial(trial.params)
        suggest(self.space, fixed)
        state, value, intermediate = self._outcome(trial)
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value,
                params=trial.params,
                distributions=fixed.distributions,
                intermediate_values=intermediate,
            )
        )

    def _outcome(self, trial: Trial) -> tuple[TrialState, float | None, dict[int, float]]:
        best = best_epoch(trial.rows, self.metric)
        if trial.status in ("completed", "converged") and best is not None:
            return TrialState.COMPLETE, loss_like(self.metric, best[self.metric]), {}
        if trial.status in ("failed", "interrupted"):
            return TrialState.FAIL, None, {}
        if trial.status != "stopped":
            return TrialState.PRUNED, None, {}
        rows = [row for row in trial.rows if row[self.metric] is not None]
        losses = {row["epoch"]: loss_like(self.metric, row[self.metric]) for row in rows}
        return TrialState.PRUNED, next(reversed(losses.values()), None), losses
