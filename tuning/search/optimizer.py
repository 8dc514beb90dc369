"""The bridge to Optuna: asks for parameters and tells every end, so that no trial stays running in the study."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from tuning.record.journal import FINAL, Trial, best_epoch, loss_like
from tuning.settings.config import InputError
from tuning.settings.space import Space, active, suggest

MOST_SEEN = 1000  # told trials that the sampler sees, and SLACK more; a suggestion's time grows with them
# Of TPE, less greedy than Optuna's 1 and 24: settled by benchmarks/replay.py. Optuna 6 will have no prior weight.
PRIOR_WEIGHT, CANDIDATES = 5.0, 4
SLACK = 200  # so many more before some are left out again
Prior = Mapping[str, Any]  # of another run's trial: params, status, epochs, rank (0 the best, 1 the worst)


class Optimizer:
    """An in-memory study, rebuilt from the journal at each start.

    Ended trials are told by status: completed and converged ones with their best value; stopped ones with their least
    `early_loss`, which is near to where they would have come (without one, or where another metric is optimized, as
    PRUNED, which TPE ranks below all others, the later stopped first); diverged and out-of-memory ones as PRUNED
    without a value, which TPE ranks last, so that their region is avoided; failed and interrupted ones as FAIL, which
    it ignores. A trial that has passed a rung and still runs is told as if it had been stopped there: the constant lie
    that TPE tells of other running trials, that they are bad, would make it avoid those that do best. Probes are told
    like completed trials. Each ask has a fresh sampler seeded by (seed, trial number): a resumed search asks the same.
    Of many trials the sampler sees the best half and the newest half.

    Trials of another run are told with the value that has their rank among this run's values so far.

    Args:
        space: the search space.
        seed: of the sampler.
        metric: what is optimized.
        sampler: `tpe` (multivariate and grouped, for conditional spaces), `gp` or `random`.
        priors: another run's trials, from `read_priors`.
    """

    def __init__(
        self,
        space: Space,
        *,
        seed: int,
        metric: str,
        sampler: Literal["tpe", "gp", "random"] = "tpe",
        priors: Iterable[Prior] = (),
    ):
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line per told trial otherwise
        self._space, self._seed, self._metric, self._sampler = space, seed, metric, sampler
        self.stopped_as = "early_loss"  # or complete, pruned, fail: for comparison in benchmarks
        self._priors = list(priors)
        self._told: list[FrozenTrial] = []  # in the order of their ends
        self._values: list[float] = []  # best values of this run's trials
        self._open: dict[int, dict[str, Any]] = {}  # our trial number -> parameters
        self._running: dict[int, optuna.Trial]  # our trial number -> the study's, until it is told there
        self._shown: dict[int, float] = {}  # our trial number -> what it has shown, while it is open
        self._renew()

    def ask(self, number: int, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Parameters for the trial with this number: `params` where given, else suggested."""
        for open_number in sorted(self._shown.keys() & self._running.keys()):
            self.study.tell(self._running.pop(open_number), self._shown[open_number])
        if self._stale > len(self._told) // 100:  # not at each ask of a large study: 1,000 trials take 0.1 s
            self._renew()
        self.study.sampler = self._new_sampler(number)
        self._open[number] = self._begin(number, params)
        return self._open[number]

    def tell(self, trial: Trial) -> None:
        """Tell how a trial ended; a probe was never asked for."""
        self._remember(trial, trial.params if trial.number is None else self._open.pop(trial.number))

    def passed_rung(self, trial: Trial) -> None:
        """Take in what a trial that goes on has shown so far, if that can be compared with how others end."""
        shown = self._least_early_loss(trial)
        if shown is None or trial.number is None:
            return
        told = trial.number not in self._running  # and what is told in a study stays as it is told
        self._stale += told and shown != self._shown[trial.number]
        self._shown[trial.number] = shown

    def remember(self, trial: Trial) -> None:
        """Take in a trial of an earlier start; one that has not ended is left open."""
        if trial.ended:
            self._remember(trial, trial.params)
        elif trial.number is not None:
            self.ask(trial.number, trial.params)
            if trial.decisions:
                self.passed_rung(trial)

    def _new_sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = (self._seed * 1_000_003 + number) % 2**32
        with warnings.catch_warnings(action="ignore"):  # of group=True, which is experimental, and of the prior weight
            if self._sampler == "gp":
                return optuna.samplers.GPSampler(seed=seed)
            if self._sampler == "random":
                return optuna.samplers.RandomSampler(seed=seed)
            return optuna.samplers.TPESampler(
                multivariate=True,
                group=True,
                constant_liar=True,
                prior_weight=PRIOR_WEIGHT,
                n_ei_candidates=CANDIDATES,
                seed=seed,
            )

    def _begin(self, number: int, params: dict[str, Any] | None) -> dict[str, Any]:
        """Make a trial of the study."""
        if params is not None:
            self.study.enqueue_trial(params)
        self._running[number] = trial = self.study.ask()
        return suggest(self._space, trial)

    def _remember(self, trial: Trial, params: dict[str, Any]) -> None:
        """Put an ended trial in the study; not a probe where no trial can have the classifier alone trained."""
        depth = params.get("unfreeze_depth", self._space.fixed.get("unfreeze_depth", 0))
        if trial.number is None and (depth != 0 or trial.status != "completed"):
            return
        state, value, intermediate = self._outcome(trial)
        told = frozen_trial(self._space, params, state, value, intermediate)
        running = None if trial.number is None else self._running.pop(trial.number, None)
        shown = None if trial.number is None else self._shown.pop(trial.number, None)
        if running is None and shown is not None:
            self._stale += 1
        elif running is None:
            self.study.add_trial(told)
        else:
            for epoch, loss in intermediate.items():
                running.report(loss, epoch)
            self.study.tell(running, value if state == TrialState.COMPLETE else None, state)
        self._told.append(told)
        self._values += [] if value is None else [value]
        count = len(self._told)
        if count >= MOST_SEEN + SLACK or (self._priors and (count < 16 or count & (count - 1) == 0)):
            self._renew()

    def _renew(self) -> None:
        """A new study: another run's trials in this run's values; the best and the newest told; those that run."""
        if len(self._told) >= MOST_SEEN + SLACK:
            older, newest = self._told[: -MOST_SEEN // 2], self._told[-MOST_SEEN // 2 :]
            limit = sorted(map(_order, older))[MOST_SEEN // 2 - 1]
            self._told = [told for told in older if _order(told) <= limit][: MOST_SEEN // 2] + newest
        self.study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=0))
        self.study.add_trials([*map(self._prior, self._priors), *self._told])
        self._running = {}
        for number, params in self._open.items():
            if number in self._shown:
                self.study.add_trial(frozen_trial(self._space, params, TrialState.COMPLETE, self._shown[number], {}))
            else:
                self._begin(number, params)
        self._stale = 0  # trials that are told otherwise than they are known by now

    def _prior(self, prior: Prior) -> FrozenTrial:
        value = float(np.quantile(self._values, prior["rank"])) if self._values else prior["rank"]
        if prior["status"] in ("completed", "converged"):
            return frozen_trial(self._space, prior["params"], TrialState.COMPLETE, value, {})
        told = {prior["epochs"]: value} if prior["status"] == "stopped" else {}
        return frozen_trial(self._space, prior["params"], TrialState.PRUNED, value if told else None, told)

    def _outcome(self, trial: Trial) -> tuple[TrialState, float | None, dict[int, float]]:
        best = best_epoch(trial.rows, self._metric)
        ended_well = ("completed", "converged", *(["stopped"] if self.stopped_as == "complete" else []))
        if trial.status == "stopped" and (shown := self._least_early_loss(trial)) is not None:
            return TrialState.COMPLETE, shown, {}
        if trial.status in ended_well and best is not None:
            return TrialState.COMPLETE, loss_like(self._metric, best[self._metric]), {}
        if trial.status in ("failed", "interrupted") or (trial.status == "stopped" and self.stopped_as == "fail"):
            return TrialState.FAIL, None, {}
        if trial.status != "stopped":
            return TrialState.PRUNED, None, {}
        rows = [row for row in trial.rows if row[self._metric] is not None]
        losses = {row["epoch"]: loss_like(self._metric, row[self._metric]) for row in rows}
        return TrialState.PRUNED, next(reversed(losses.values()), None), losses

    def _least_early_loss(self, trial: Trial) -> float | None:
        """Null where it is not measured, or is no value of what is optimized."""
        if self.stopped_as != "early_loss" or self._metric != "val_loss":
            return None
        until = trial.decisions[-1]["epoch"] if trial.decisions else math.inf
        early = [row.get("early_loss") for row in trial.rows if row["epoch"] <= until]
        return min((loss for loss in early if loss is not None), default=None)


def frozen_trial(
    space: Space, params: Mapping[str, Any], state: TrialState, value: float | None, intermediate: dict[int, float]
) -> FrozenTrial:
    """An ended trial of a study."""
    fixed = optuna.trial.FixedTrial(dict(params))
    suggest(space, fixed)
    distributions: dict[str, BaseDistribution] = fixed.distributions
    return optuna.trial.create_trial(
        state=state,
        value=value,
        params=dict(params),
        distributions=distributions,
        intermediate_values=intermediate,
    )


def _order(told: FrozenTrial) -> tuple[bool, float, float]:
    """As TPE ranks them: complete ones by value, then pruned ones by epoch and value."""
    if told.state == TrialState.COMPLETE:
        assert told.value is not None
        return False, told.value, 0.0
    epoch, loss = max(told.intermediate_values.items(), default=(0, math.inf))
    return True, -epoch, loss


# ---- warm start -------------------------------------------------------------------------------------------------


def read_priors(trials: pd.DataFrame, space: Space, metric: str, weight: float) -> tuple[list[Prior], int]:
    """What another run's table of trials tells about this space.

    Its start points and suggested trials are ranked by their best value, those without any as the worst. A share
    `weight` of them is taken, evenly over the ranks: so much counts a trial of another run beside one of this run's.

    Returns:
        The priors, best first, and the number of trials that lie outside this space.
    """
    ended = trials[trials["origin"].isin(["start", "suggested"]) & ~trials["status"].isin(["failed", "interrupted"])]
    ended = ended[ended["status"] != "running"]
    losses = ended[metric].map(lambda value: loss_like(metric, value)).fillna(math.inf)
    ended = ended.loc[losses.sort_values(kind="stable").index]
    inside: list[dict[str, Any]] = []
    for place, row in enumerate(ended.to_dict("records")):
        values = {name.removeprefix("config_"): value for name, value in row.items() if name.startswith("config_")}
        params = active(space, values)
        if _contains(space, values, params):
            rank = place / max(len(ended) - 1, 1)
            inside.append({"params": params, "status": row["status"], "epochs": int(row["epochs"]), "rank": rank})
    count = math.ceil(weight * len(inside))
    places = np.unique(np.linspace(0, max(len(inside) - 1, 0), count).round().astype(int))
    return [inside[place] for place in places], len(ended) - len(inside)


def _contains(space: Space, values: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    """Whether a configuration is one that the space can suggest, whatever it holds fixed but its backbone."""
    if values["backbone"] != space.fixed.get("backbone", values["backbone"]):
        return False
    try:
        fixed = optuna.trial.FixedTrial(dict(params))
        with warnings.catch_warnings(action="error"):  # of a value outside the range
            suggest(space, fixed)
    except (ValueError, UserWarning):
        return False
    return True


# ---- a study that others open -----------------------------------------------------------------------------------


class LiveStudy:
    """A copy of the search in a storage that `optuna-dashboard` opens while it runs; nothing is read from it.

    Args:
        url: of SQLAlchemy (sqlite:///study.db, postgresql://...), or a journal file's path ending in .log.
        name: of the study.
        space: the search space.
        anew: whether a study of this name may be there, to be replaced.

    Raises:
        InputError: the storage can't be opened, or has the study.
    """

    def __init__(self, url: str, name: str, space: Space, *, anew: bool):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._trials = space, dict[str, optuna.Trial]()
        try:
            storage: str | BaseStorage = JournalStorage(JournalFileBackend(url)) if url.endswith(".log") else url
            if anew and name in optuna.get_all_study_names(storage):
                optuna.delete_study(study_name=name, storage=storage)
            self._study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
        except optuna.exceptions.DuplicatedStudyError:
            raise InputError(f"optuna_storage: has a study {name} already; choose another --name") from None
        except ImportError as error:
            package = getattr(error.__cause__, "name", None) or "for which see SQLAlchemy's manual"
            raise InputError(f"optuna_storage: install the database's driver, {package}") from error
        except Exception as error:  # of whichever database; its message may hold a password
            cure = "give sqlite:///FILE.db, postgresql://..., or a path ending in .log; no run keeps a password: to go "
            cure += "on, give the URL again by --set, or have the password in ~/.pgpass"
            raise InputError(f"optuna_storage: can't be opened ({type(error).__name__}); {cure}") from error

    def show(self, event: Mapping[str, Any], trial: Trial, metric: str) -> None:
        """Show an event of the journal: a trial asked for, an epoch, an end. Raises whatever the storage does."""
        if event["event"] == "asked":
            named = {"trial_id": trial.trial_id, "origin": trial.origin}
            self._study.enqueue_trial(trial.params, user_attrs=named)
            self._trials[trial.trial_id] = running = self._study.ask()
            suggest(self._space, running)
        elif event["event"] == "epoch" and event[metric] is not None:
            self._trials[trial.trial_id].report(loss_like(metric, event[metric]), event["epoch"])
        elif event["event"] == "ended" and event["status"] in FINAL:
            running, best = self._trials.pop(trial.trial_id), best_epoch(trial.rows, metric)
            running.set_user_attr("status", event["status"])
            if best is not None and event["status"] in ("completed", "converged"):
                self._study.tell(running, loss_like(metric, best[metric]))
            else:
                failed = event["status"] == "failed"
                self._study.tell(running, state=TrialState.FAIL if failed else TrialState.PRUNED)
