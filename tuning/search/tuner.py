"""Ray Tune's view of a search: where trials come from, how they end, and what to do about workers that die or hang."""

import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import ray
from ray import tune
from ray.air._internal import usage
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution.class_cache import _ActorClassCache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.impl import tuner_internal
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuning.search.cluster import restored_environment
from tuning.search.trainable import LAST_SENDING_SECONDS

FINISHED = str(Searcher.FINISHED)  # what `Search.next_trial` returns at the end
START_SECONDS = 120.0  # for a placed worker to come up, before its trial may be given another
_placed: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # when each worker was first seen, in monotonic seconds
_reuse, _actor_class = TuneController._maybe_reuse_cached_actor, _ActorClassCache.get
LOOK_SECONDS = 1.0  # at most this much is added to a trial's silence at each look


def fit(search: Any, trainable: type[tune.Trainable]) -> None:
    """Run a `driver.Search` to its end, as a new Ray experiment in a temporary folder."""
    # Ray's memory monitor kills workers with an error that Tune doesn't take for a dead actor's: it would end the run.
    OutOfMemoryError.__bases__ = (RayActorError,)
    OutOfMemoryError._preempted = OutOfMemoryError._actor_init_failed = False
    TuneController._maybe_reuse_cached_actor, _ActorClassCache.get = reuse, actor_class
    # Its results are the journal's; to collect them Ray fails if a trial was still waiting when the search ended.
    tuner_internal.ResultGrid = lambda analysis: None
    # To count callbacks for usage statistics, which are off, Ray imports MLflow and others, where they are installed.
    usage.tag_callbacks = lambda callbacks: False
    settings = {
        "RAY_AIR_NEW_OUTPUT": "0",  # only the old output respects verbose=0
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # Ray's own experiment state is never read
    }
    tune_config = tune.TuneConfig(
        search_alg=_Searcher(search),
        scheduler=_Scheduler(search),
        num_samples=-1,
        max_concurrent_trials=search.resources.count,
        reuse_actors=True,
        trial_dirname_creator=lambda trial: str(trial.trial_id),
    )
    ray_files = tempfile.TemporaryDirectory(prefix="finetune-search-", ignore_cleanup_errors=True)
    with restored_environment(), ray_files as ray_folder:
        os.environ.update(settings | os.environ)  # the user's values count
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(search.resources.count)  # before Ray 2.60 the default was 1
        run_config = tune.RunConfig(
            name="ray",
            storage_path=ray_folder,
            verbose=0,
            progress_reporter=tune.CLIReporter(),  # says nothing; in a notebook the default clears what was printed
            failure_config=tune.FailureConfig(max_failures=0),  # `Search.lost` retries
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            callbacks=[_Started(search), _NoProgress()],
        )
        tune.Tuner(trainable, tune_config=tune_config, run_config=run_config).fit()


def starts(controller: Any, trial: Any) -> bool:
    """Return whether a waiting trial's worker was placed a short while ago, and is about to come up."""
    worker = controller._trial_to_actor.get(trial)
    if worker is None or not controller._actor_manager.is_actor_started(worker):
        return False
    return time.monotonic() - _placed.setdefault(worker, time.monotonic()) < START_SECONDS


def reuse(controller: Any, trial: Any) -> bool:
    """Give a trial the worker of an ended trial, if there is one, unless its own is about to come up.

    Ray would cancel that one. If trials end faster than workers start, a node that has joined would never be used.
    """
    return not starts(controller, trial) and _reuse(controller, trial)


def actor_class(cache: Any, trainable: type[tune.Trainable]) -> Any:
    """Return the trainable's remote class, whose actors on this machine alone are workers that have loaded torch.

    Ray gives it environment variables, which only new processes could have; here they inherit the driver's.
    """
    if "RAY_ADDRESS" in os.environ:
        return _actor_class(cache, trainable)
    return cache._cache.setdefault(trainable, ray.remote(trainable))


class _Searcher(Searcher):  # type: ignore[misc]
    """Ray's view of where trials come from."""

    def __init__(self, search: Any):
        super().__init__()
        self._search = search

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        given: dict[str, Any] | str | None = self._search.next_trial(trial_id)
        self._search.finished = given == FINISHED
        return given

    def _do_nothing(self, *args: Any, **kwargs: Any) -> None:
        """Ends are handled in `Search.result`, since Ray swallows exceptions here, and nothing resumes from Ray."""

    on_trial_complete = save = restore = _do_nothing


class _Scheduler(FIFOScheduler):  # type: ignore[misc]
    """Ray's view of how trials end."""

    def __init__(self, search: Any):
        super().__init__()
        self._search = search
        self._silent: dict[Any, float] = {}  # seconds since each of Ray's trials last reported
        self._looked = time.monotonic()
        self._hung: set[Any] = set()
        self._held: list[Any] = []  # Ray's trials that hold slots on which trials fail

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Also kill workers that hang and, at the end, drop waiting trials: Ray calls this ten times a second."""
        timeout, looked, self._looked = self._search.plan.trial_timeout or math.inf, self._looked, time.monotonic()
        passed = min(self._looked - looked, LOOK_SECONDS)  # time in which the driver itself stood still doesn't count
        over = self._search.is_over()
        while self._held and (over or self._search.finished):
            tune_controller.stop_trial(self._held.pop())
        for trial, silent in list(self._silent.items()):
            worker = trial.temporary_state.ray_actor
            self._silent[trial] = 0.0 if worker is None else silent + passed
            if worker is None and over and trial.status == trial.PENDING:  # Ray would start it, room or not
                tune_controller.stop_trial(trial)
            elif self._silent[trial] > timeout and trial not in self._hung:
                self._hung.add(trial)
                ray.kill(worker)
        controller = tune_controller._tune_controller
        waiting = [trial for trial in self._silent if trial.status == trial.PENDING and not starts(controller, trial)]
        ready = controller._actor_cache.has_cached_object
        return next((trial for trial in waiting if ready(trial.placement_group_factory)), next(iter(waiting), None))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._silent[trial] = 0.0
        if self._search.mirror is not None:  # at the end Ray waits 10 s for workers, which may still be sending files
            tune_controller._tune_controller._actor_force_cleanup_timeout = LAST_SENDING_SECONDS + 30.0

    def on_trial_remove(self, tune_controller: Any, trial: Any, result: dict[str, Any] | None = None) -> None:
        self._silent.pop(trial, None)

    on_trial_complete = on_trial_remove

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        row = json.loads(result["row"])
        if "broken" in row:
            self._search.broken(trial.trial_id, row["broken"])
            return self._hold(tune_controller, trial)
        self._silent[trial] = 0.0
        worker = f"{result['hostname']} {result['pid']}"
        continues = self._search.result(trial.trial_id, row, worker)
        if not continues and self._search.fails(trial.trial_id, worker):
            return self._hold(tune_controller, trial)
        return str(TrialScheduler.CONTINUE if continues else TrialScheduler.STOP)

    def _hold(self, tune_controller: Any, trial: Any) -> str:
        """Have Ray's trial go on without doing anything, so that no other is placed where it is."""
        tune_controller._tune_controller._search_alg.on_trial_complete(trial.trial_id)  # it is no concurrent trial
        del self._silent[trial]
        self._held.append(trial)
        return str(TrialScheduler.NOOP)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._silent.pop(trial, None)
        error = Path(trial.error_file).read_text()  # `trial.get_error` reads where the file will be copied to
        self._search.lost(trial.trial_id, error, hung=trial in self._hung)


class _NoProgress(TrialProgressCallback):  # type: ignore[misc]
    """Takes the place of Ray's own, which prints a line of each trial that ends without a result, despite verbose=0."""

    def on_trial_complete(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Started(tune.Callback):  # type: ignore[misc]
    """Ray's view of when trials start."""

    def __init__(self, search: Any):
        self._search = search

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._search.started(trial.trial_id)
