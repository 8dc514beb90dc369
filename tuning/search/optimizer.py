"""The bridge to Optuna: asks for parameters and tells every end, so that no trial stays running in the study."""

import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna
import pandas as pd
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from tuning.record.journal import FINAL, LOSSES, PROMOTED, Trial, best_epoch, loss_like
from tuning.search.neighbours import SHARE, near_best
from tuning.settings.config import InputError
from tuning.settings.space import Key, Space, active, same, suggest

MOST_SEEN = 1000  # ended trials that the sampler sees: the time of a suggestion grows with them
SLACK = 200  # ended trials beyond `MOST_SEEN` before the study is thinned again
STARTUP_TRIALS = 10  # until so many are known, TPE suggests at random
# Multivariate and grouped for conditional spaces; less greedy than Optuna's weight of 1 and 24 candidates, as
# benchmarks/replay.py showed. Optuna 6 drops the prior weight.
TPE: dict[str, Any] = {"multivariate": True, "group": True, "constant_liar": True}
TPE |= {"prior_weight": 5.0, "n_ei_candidates": 4, "n_startup_trials": STARTUP_TRIALS}
Sampler = Literal["tpe", "gp", "random"]
Prior = Mapping[str, Any]  # a trial of another run: params, status, epochs, rank (0 the best, 1 the worst)


class Optimizer:
    """An in-memory Optuna study, rebuilt from the journal at each start.

    Ended trials are told by status: `completed` and `converged` as COMPLETE with their best value; `stopped` as
    COMPLETE with their lowest `early_loss`, which is close to the loss they would have reached (without one, or if
    another metric is optimized, as PRUNED, which TPE ranks below all others, later stopped ones first); `diverged` and
    `out_of_memory` as PRUNED without a value, which TPE ranks last, so that it avoids their region; `failed` and
    `interrupted` as FAIL, which it ignores. Probes are told like completed trials; trials of another run (`priors`,
    from `read_priors`) with the value that has their rank among this run's values so far. A running trial that has
    passed a rung is told as if stopped there: TPE's constant liar, which takes running trials for bad ones, would avoid
    the region of the very trials that do best. Each ask uses a new sampler seeded by (seed, trial number), so a resumed
    search gets the same suggestions. Of many ended trials the sampler sees the best half and the newest half.
    """

    def __init__(
        self,
        space: Space,
        *,
        seed: int,
        metric: str,
        sampler: Sampler = "tpe",
        local_search: bool = False,
        priors: Iterable[Prior] = (),
    ):
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # else a line per trial
        self._space, self._seed, self._metric, self._sampler = space, seed, metric, sampler
        self._local_search = local_search and sampler == "tpe"
        self.stopped_as = "early_loss"  # or complete, pruned, fail, which benchmarks compare
        self._priors = list(priors)
        self._ended: list[FrozenTrial] = []  # in the order in which they ended
        self._values: list[float] = []  # best values of this run's trials
        self._open: dict[int, dict[str, Any]] = {}  # parameters by trial number
        self._running: dict[int, optuna.Trial]  # the study's running trials by our trial number
        self._interim: dict[int, float] = {}  # values of open trials at their last rung, by trial number
        self._renew()

    def ask(
        self, number: int, params: dict[str, Any] | None = None, untried: Mapping[Key, dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Return parameters for the trial with this number: `params` if given, else suggested ones.

        With `local_search` most of these are from `near_best`, the others from the sampler. If `untried` are given, by
        their keys of `space.same`, a suggestion that is not among them, and so would repeat a trial, is replaced by one
        of them, drawn at random.
        """
        for open_number in sorted(self._interim.keys() & self._running.keys()):
            self.study.tell(self._running.pop(open_number), self._interim[open_number])
        # Not at every ask of a large study, since 1,000 trials take 0.1 s; with priors, as they have this run's values.
        if self._priors or self._stale > len(self._ended) // 100:
            self._renew()
        self.study.sampler = self._new_sampler(number)
        suggested = params is None
        if suggested and self._local_search:
            params = self._near_best(number)
        self._open[number] = self._begin(number, params)
        if suggested and untried and same(self._open[number]) not in untried:
            self.study.tell(self._running.pop(number), state=TrialState.FAIL)  # which samplers ignore
            place = int(np.random.default_rng([self._seed, number]).integers(len(untried)))
            self._open[number] = self._begin(number, list(untried.values())[place])
        return self._open[number]

    def tell(self, trial: Trial) -> None:
        """Add an ended trial; not a probe unless the space can suggest to train the classifier alone."""
        depth = trial.params.get("unfreeze_depth", self._space.fixed.get("unfreeze_depth", 0))
        if trial.number is None and (depth != 0 or trial.status != "completed"):
            return
        state, value, intermediate = self._outcome(trial)
        ended = frozen_trial(self._space, trial.params, state, value, intermediate)
        running = interim = None
        if trial.number is not None:
            self._open.pop(trial.number, None)  # not there if it ended in an earlier start
            running = self._running.pop(trial.number, None)
            interim = self._interim.pop(trial.number, None)
        if running is not None:
            for epoch, loss in intermediate.items():
                running.report(loss, epoch)
            self.study.tell(running, value if state == TrialState.COMPLETE else None, state)
        elif interim is not None:  # at once if it had been promoted, since a rebuilt study knows its end
            self._stale += 1 + len(self._ended) * (PROMOTED in {row.get("verdict") for row in trial.decisions})
        else:
            self.study.add_trial(ended)
        self._ended.append(ended)
        self._values += [] if value is None else [value]
        count = len(self._ended)
        if count >= MOST_SEEN + SLACK:
            self._renew()

    def passed_rung(self, trial: Trial) -> None:
        """Take in the value of a trial that continues after a rung, if it is comparable with the values of others."""
        value = self._lowest_early_loss(trial)
        if value is None or trial.number is None:
            return
        told = trial.number not in self._running  # a study's told trials can't be changed
        self._stale += told and value != self._interim[trial.number]
        self._interim[trial.number] = value

    def reopen(self, trial: Trial) -> None:
        """Take back the end of a stopped trial that is to continue."""
        assert trial.number is not None
        _, value, _ = self._outcome(trial)
        told = next((ended for ended in self._ended if (ended.params, ended.value) == (trial.params, value)), None)
        self._ended = [ended for ended in self._ended if ended is not told]  # not there in a thinned study
        if value is not None:
            self._values.remove(value)
        self._open[trial.number] = dict(trial.params)
        if (reached := self._lowest_early_loss(trial)) is not None:
            self._interim[trial.number] = reached
        self._renew()

    def restore(self, trial: Trial) -> None:
        """Add a trial of an earlier start; one that has not ended stays open."""
        if trial.ended:
            self.tell(trial)
        elif trial.number is not None:
            self.ask(trial.number, trial.params)
            if trial.decisions:
                self.passed_rung(trial)

    def _new_sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = (self._seed * 1_000_003 + number) % 2**32
        with warnings.catch_warnings(action="ignore"):  # group=True is experimental, prior_weight deprecated
            if self._sampler == "gp":
                return optuna.samplers.GPSampler(seed=seed)
            if self._sampler == "random":
                return optuna.samplers.RandomSampler(seed=seed)
            return optuna.samplers.TPESampler(**TPE, seed=seed)

    def _near_best(self, number: int) -> dict[str, Any] | None:
        rng = np.random.default_rng([self._seed, number, 1])
        if rng.random() >= SHARE:
            return None
        ended = [each for each in self._ended if each.state == TrialState.COMPLETE]
        known = [(each.value, each.params) for each in ended if each.value is not None]
        known += [(value, self._open[running]) for running, value in sorted(self._interim.items())]
        tried = [each.params for each in self._ended] + list(self._open.values())
        return near_best(self._space, known, tried, rng)

    def _begin(self, number: int, params: dict[str, Any] | None) -> dict[str, Any]:
        """Start a trial in the study."""
        if params is not None:
            self.study.enqueue_trial(params)
        self._running[number] = trial = self.study.ask()
        return suggest(self._space, trial)

    def _renew(self) -> None:
        """Make the study anew, of the other run's trials at this run's values, the ended trials and the open ones."""
        if len(self._ended) >= MOST_SEEN + SLACK:
            older, newest = self._ended[: -MOST_SEEN // 2], self._ended[-MOST_SEEN // 2 :]
            limit = sorted(map(_order, older))[MOST_SEEN // 2 - 1]
            self._ended = [ended for ended in older if _order(ended) <= limit][: MOST_SEEN // 2] + newest
        self.study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=0))
        self.study.add_trials([*map(self._prior, self._priors), *self._ended])
        self._running = {}
        for number, params in self._open.items():
            if number in self._interim:
                self.study.add_trial(frozen_trial(self._space, params, TrialState.COMPLETE, self._interim[number], {}))
            else:
                self._begin(number, params)
        self._stale = 0  # trials whose value in the study is out of date

    def _prior(self, prior: Prior) -> FrozenTrial:
        value = float(np.quantile(self._values, prior["rank"])) if self._values else prior["rank"]
        if prior["status"] in ("completed", "converged"):
            return frozen_trial(self._space, prior["params"], TrialState.COMPLETE, value, {})
        values = {prior["epochs"]: value} if prior["status"] == "stopped" else {}
        return frozen_trial(self._space, prior["params"], TrialState.PRUNED, value if values else None, values)

    def _outcome(self, trial: Trial) -> tuple[TrialState, float | None, dict[int, float]]:
        """State, value and intermediate values to tell for an ended trial."""
        stopped, best = trial.status == "stopped", best_epoch(trial.rows, self._metric)
        if stopped and (early_loss := self._lowest_early_loss(trial)) is not None:
            return TrialState.COMPLETE, early_loss, {}
        complete = trial.status in ("completed", "converged") or (stopped and self.stopped_as == "complete")
        if complete and best is not None:
            return TrialState.COMPLETE, loss_like(self._metric, best[self._metric]), {}
        if trial.status in ("failed", "interrupted") or (stopped and self.stopped_as == "fail"):
            return TrialState.FAIL, None, {}
        if not stopped:
            return TrialState.PRUNED, None, {}
        known = [row for row in trial.rows if row[self._metric] is not None]
        losses = {row["epoch"]: loss_like(self._metric, row[self._metric]) for row in known}
        return TrialState.PRUNED, next(reversed(losses.values()), None), losses

    def _lowest_early_loss(self, trial: Trial) -> float | None:
        """Of the epochs up to the last rung; None if it isn't measured, or another metric is optimized."""
        if self.stopped_as != "early_loss" or self._metric not in LOSSES:
            return None
        until = trial.decisions[-1]["epoch"] if trial.decisions else math.inf
        losses = [row.get("early_loss") for row in trial.rows if row["epoch"] <= until]
        return min((loss for loss in losses if loss is not None), default=None)


def frozen_trial(
    space: Space, params: Mapping[str, Any], state: TrialState, value: float | None, intermediate: dict[int, float]
) -> FrozenTrial:
    """Make an ended trial for a study."""
    params = dict(params)
    fixed = optuna.trial.FixedTrial(params)
    suggest(space, fixed)
    return optuna.trial.create_trial(
        state=state, value=value, params=params, distributions=fixed.distributions, intermediate_values=intermediate
    )


def _order(ended: FrozenTrial) -> tuple[bool, float, float]:
    """Sort key in TPE's order: complete trials by value, then pruned ones by epoch and value."""
    if ended.state == TrialState.COMPLETE:
        assert ended.value is not None
        return False, ended.value, 0.0
    epoch, loss = max(ended.intermediate_values.items(), default=(0, math.inf))
    return True, -epoch, loss


# ---- warm start -------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """What the sampler can learn from another run."""

    priors: list[Prior]  # the best first
    outside: int  # trials that lie outside the space
    otherwise: Counter[str]  # of the priors, by fixed parameter: how many had another value than the space


def read_priors(trials: pd.DataFrame, space: Space, metric: str, weight: float) -> Read:
    """Read from another run's table of trials what the sampler can learn about this space.

    Start points, enqueued and suggested trials are ranked by their best value; those without one rank last. A share
    `weight` of them is taken, evenly over the ranks: the weight of another run's trial relative to one of this run.
    """
    unusable = trials["status"].isin(["failed", "interrupted", "running"])
    ended = trials[trials["origin"].isin(["start", "enqueued", "suggested"]) & ~unusable]
    losses = ended[metric].map(lambda value: loss_like(metric, value)).fillna(math.inf)
    ended = ended.loc[losses.sort_values(kind="stable").index]
    inside: list[tuple[Prior, list[str]]] = []
    for place, row in enumerate(ended.to_dict("records")):
        values = {name.removeprefix("config_"): value for name, value in row.items() if name.startswith("config_")}
        params = active(space, values)
        if _contains(space, values, params):
            rank = place / max(len(ended) - 1, 1)
            prior = {"params": params, "status": row["status"], "epochs": int(row["epochs"]), "rank": rank}
            others = [name for name, value in space.fixed.items() if values.get(name, value) != value]
            inside.append((prior, others))
    count = math.ceil(weight * len(inside))
    places = np.unique(np.linspace(0, max(len(inside) - 1, 0), count).round().astype(int))
    taken = [inside[place] for place in places]
    otherwise = Counter(name for _, others in taken for name in others)
    return Read([prior for prior, _ in taken], len(ended) - len(inside), otherwise)


def _contains(space: Space, values: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    """Whether the space can suggest these parameters. Of its fixed values only the backbone has to agree."""
    if values["backbone"] != space.fixed.get("backbone", values["backbone"]):
        return False
    try:
        fixed = optuna.trial.FixedTrial(dict(params))
        with warnings.catch_warnings(action="error"):  # Optuna warns of a value outside the range
            suggest(space, fixed)
    except (ValueError, UserWarning):
        return False
    return True


# ---- live study -------------------------------------------------------------------------------------------------


def check_study(url: str, name: str, run_id: str | None) -> None:
    """Check that a search may write a study in a storage; arguments as of `LiveStudy`, `run_id` None of a new run.

    Raises:
        InputError: the storage can't be opened, or has another study of this name.
    """
    with _opened(url) as storage:
        _exists(storage, name, run_id)


class LiveStudy:
    """A copy of the search in a storage that `optuna-dashboard` can open meanwhile; the search never reads it.

    Args:
        url: an SQLAlchemy URL (sqlite:///study.db, postgresql://...), or a journal file's path ending in .log.
        run_id: marks the study as this run's: no other may be replaced.

    Raises:
        InputError: as `check_study`.
    """

    def __init__(self, url: str, name: str, space: Space, run_id: str):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._trials, self._failed = space, dict[str, optuna.Trial](), False
        with _opened(url) as storage:
            if _exists(storage, name, run_id):
                optuna.delete_study(study_name=name, storage=storage)
            self._study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
            self._study.set_user_attr("run_id", run_id)

    def restore(self, trials: Iterable[Trial], metric: str) -> None:
        """Copy the trials of earlier starts."""
        for trial in trials:
            ended = [{"event": "ended", "status": trial.status}] if trial.ended else []
            for event in ({"event": "asked"}, *trial.rows, *ended):
                self.show(event, trial, metric)

    def show(self, event: Mapping[str, Any], trial: Trial, metric: str) -> None:
        """Copy a journal event of this trial. If the storage fails, that ends the copy, not the search."""
        if self._failed:
            return
        kind, trial_id = event["event"], trial.trial_id
        try:
            if kind == "asked":
                self._study.enqueue_trial(trial.params, user_attrs={"trial_id": trial_id, "origin": trial.origin})
                self._trials[trial_id] = self._study.ask()
                suggest(self._space, self._trials[trial_id])
            elif kind == "epoch" and event[metric] is not None:
                self._trials[trial_id].report(loss_like(metric, event[metric]), event["epoch"])
            elif kind == "decision" and event["verdict"] == PROMOTED:  # a told trial can't be changed: once more
                for again in ({"event": "asked"}, *trial.rows):
                    self.show(again, trial, metric)
            elif kind == "ended" and event["status"] in FINAL:
                status, running, best = event["status"], self._trials.pop(trial_id), best_epoch(trial.rows, metric)
                running.set_user_attr("status", status)
                running.set_user_attr(f"best {metric}", None if best is None else best[metric])
                if best is not None and status in ("completed", "converged"):
                    self._study.tell(running, loss_like(metric, best[metric]))
                else:
                    self._study.tell(running, state=TrialState.FAIL if status == "failed" else TrialState.PRUNED)
        except Exception as error:  # any database's
            print(f"optuna_storage: {type(error).__name__}; the live study is no longer updated", file=sys.stderr)
            self._failed = True


@contextmanager
def _opened(url: str) -> Iterator[str | BaseStorage]:
    try:
        yield JournalStorage(JournalFileBackend(url)) if url.endswith(".log") else url
    except InputError:
        raise
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or "see SQLAlchemy's manual"
        raise InputError(f"optuna_storage: install the database driver ({package})") from error
    except Exception as error:  # any database's; its message may contain a password
        cure = "give sqlite:///FILE.db, postgresql://..., or a path ending in .log; passwords are not stored: to "
        cure += "resume, give the URL again by --set, or keep the password in ~/.pgpass"
        raise InputError(f"optuna_storage: can't be opened ({type(error).__name__}); {cure}") from error


def _exists(storage: str | BaseStorage, name: str, run_id: str | None) -> bool:
    """Return whether there is a study of this name, which is then empty or this run's; else raise InputError."""
    if name not in optuna.get_all_study_names(storage):
        return False
    study = optuna.load_study(study_name=name, storage=storage)
    if study.get_trials(deepcopy=False) and (run_id is None or study.user_attrs.get("run_id") != run_id):
        cure = "give another storage, or a new run another --name; no other study is replaced"
        raise InputError(f"optuna_storage: a study named {name} that this run didn't make is there; {cure}")
    return True
