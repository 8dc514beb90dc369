"""The driver: schedules trials, journals what they report, decides which to stop, and resumes after a crash."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
from ray import tune

from tuning.record.journal import PROMOTED, Journal, Trial, read_record
from tuning.record.mirror import Mirror
from tuning.record.tables import make_tables, write_tables
from tuning.search.checkpoints import delete_temporary_files, delete_unneeded, state_file
from tuning.search.cluster import Slots
from tuning.search.finalists import finalist_runs_left
from tuning.search.gpus import Packing
from tuning.search.optimizer import LiveStudy, Optimizer, Prior
from tuning.search.promotion import best_stopped, promotable, spare_seconds
from tuning.search.proposals import finalist, probe, searched_trial
from tuning.search.stopping import Rungs, as_loss, stop_reason, stratum, value_at_rung
from tuning.search.trainable import FinetuneTrial
from tuning.search.tuner import FINISHED, fit
from tuning.settings.config import SearchPlan, cache_folder
from tuning.settings.space import Key, Space, configurations, same
from tuning.settings.values import Weights
from tuning.settings.words import count
from tuning.training.digests import plain
from tuning.training.outputs import run_folder

TABLE_SECONDS, TABLE_SHARE = 5.0, 0.05  # between two writings of the tables; the largest share of time spent on it
LOST_ACTOR_RETRIES = 3
LOST_STARTS = 10  # times that a trial's worker may die before the trial has begun
LOST_START_SECONDS = 1.0  # before trials are scheduled again: a node that dies takes several workers
LOW_ON_MEMORY = "running low on memory"  # in Ray's error if its memory monitor killed the worker
RAISED = "RayTaskError"  # in Ray's error if the worker raised an exception, and was not killed
FAILURES_AT_FIRST = 4  # if the first trials all fail, or those of one slot, the cause is not in their configurations
RESUME = "--resume continues this trial"
BUDGET_USED = "the time budget is used up"


class Search:
    """The state of a search: journal, record, rungs and study, rebuilt from the journal at each start.

    Args:
        run: the run's folder; holds `samples.parquet`.
        images: folder of decoded images by image size.
        weights, digests: weights, and the sha256 of their file, by backbone; workers don't check files without one.
        resources: what each trial is given.
        show: called with each trial that has reported or ended.
        priors: from `optimizer.read_priors`; a resumed search has them in its journal.
        report: called after the tables have been written; limits its own share of the time.
        redraw: whether finalists get a new random split of training and validation: not if the user fixed the split.
        mirror: keeps the copy of a run whose storage is not on this machine.
        run_id: tells this run from others of the same name.
        clock: returns seconds; simulated in benchmarks.
        trainable: what runs in Ray's actors; benchmarks give one that costs nothing.
    """

    def __init__(
        self,
        plan: SearchPlan,
        space: Space,
        run: Path,
        *,
        images: dict[int, Path],
        weights: dict[str, Weights | None],
        digests: Mapping[str, str | None] = MappingProxyType({}),
        resources: Slots,
        show: Callable[["Search", Trial], None],
        priors: Sequence[Prior] = (),
        report: Callable[[], object] = lambda: None,
        redraw: bool = False,
        mirror: Mirror | None = None,
        run_id: str = "",
        clock: Callable[[], float] = time.monotonic,
        trainable: type[tune.Trainable] = FinetuneTrial,
    ):
        self.plan, self.space, self.run_folder, self.resources = plan, space, run, resources
        self.show, self.mirror = show, mirror
        self._redraw, self._report, self._trainable = redraw, report, trainable
        self.journal = Journal(run / "journal.jsonl", clock)
        self.record = read_record(run / "journal.jsonl")
        self.started_wall_s = self.journal.wall_s
        self._live = None
        if plan.optuna_storage is not None:
            self._live = LiveStudy(plan.optuna_storage, plan.name, space, run_id)
            self._live.restore(self.record.trials.values(), plan.metric)
        if priors and not (self.record.trials or self.record.priors):
            self._write("priors", priors=list(priors))
        self.optimizer = Optimizer(
            space,
            seed=plan.seed,
            metric=plan.metric,
            sampler=plan.sampler,
            local_search=plan.local_search,
            priors=self.record.priors,
        )
        self.rungs = Rungs(grace_epochs=plan.grace_epochs, reduction_factor=plan.reduction_factor, epochs=plan.epochs)
        self.running: dict[str, Trial] = {}  # in the order in which they started
        self.halted: str | None = None  # why no more trials are started
        self.finished = False  # whether none is left to start
        self._held = self._held_gpus = 0.0  # slots and GPUs that get no more trials
        self._failures: dict[str, float] = {}  # by worker; -inf once one of its trials has not failed
        self._tables_due = self._schedule_at = -math.inf  # monotonic seconds
        self._ray_ids: dict[str, str] = {}  # our trial id by Ray's
        self._gpus: dict[str, float] = {}  # by trial
        self._packing = Packing()
        self._finalist_runs: list[tuple[Trial, int]] | None = None  # known once all searched trials have ended
        self._every = {same(params): params for params in configurations(space) or ()}
        self._context = {
            "run": str(run.resolve()),
            "images": {str(size): str(folder) for size, folder in images.items()},
            "weights": plain(weights),
            "digests": dict(digests),
            "threads": resources.cpus,
            "cache_bytes": plan.cache_bytes,
            "device": plan.device if resources.gpus else "cpu",
            "deterministic": plan.deterministic,
            "graphs": plan.cuda_graphs,
            "storage": None if mirror is None else mirror.uri,
            "driver": None if mirror is None else mirror.claim,
            "run_id": run_id,
            "home": None if mirror is None else ray.get_runtime_context().get_node_id(),
        }
        delete_temporary_files(run)
        self._unfinished = self._rebuild()

    @property
    def searched(self) -> int:
        """Start points and suggested trials so far."""
        return sum(trial.number is not None for trial in self.record.trials.values())

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Ray pickles what it is given for a `Tuner.restore`, which is never called."""
        return object, ()

    def _rebuild(self) -> list[Trial]:
        """Rebuild rungs and study as of the journal's end; return the trials to resume."""
        unfinished = []
        for trial in self.record.trials.values():
            for row in trial.decisions:
                self.rungs.enter(trial.trial_id, row["rung"], row["stratum"], as_loss(self.plan, row["value"]))
            if not trial.ended:  # a journalled stop or end is final even if the crash came before `ended`
                if trial.rows and trial.rows[-1]["ends"] is not None:
                    self._write_end(trial, trial.rows[-1]["ends"], trial.rows[-1]["reason"])
                elif trial.decisions and trial.decisions[-1]["verdict"] == "stop":
                    self._write_end(trial, "stopped", stop_reason(self.plan, trial.decisions[-1]))
                else:
                    unfinished.append(trial)
        for trial in sorted(self.record.trials.values(), key=lambda trial: trial.ended_seq or math.inf):
            if trial.origin != "finalist":  # in the order in which they ended, as they were told
                self.optimizer.restore(trial)
        return unfinished

    # What Ray asks for.

    def next_trial(self, ray_id: str) -> dict[str, Any] | str | None:
        """Return the next trial's configuration for Ray; FINISHED at the end, None if no trial can start now."""
        if self.is_over():
            return FINISHED
        if time.monotonic() < self._schedule_at:
            return None
        trial = self._unfinished.pop(0) if self._unfinished else self._ask()
        if not isinstance(trial, Trial):
            return trial
        gpus = self.resources.gpus
        if self.resources.packed:
            gpus = self._gpu_share(trial)
            in_use = sum(share for other, share in self._gpus.items() if not self.record.trials[other].ended)
            held = self._held_gpus if gpus < 1 else math.ceil(self._held_gpus)  # perhaps a part of each of several
            if gpus == 1 and held >= self.resources.packed and not self.running:
                self.halted = "no whole GPU works, as the trial that is next needs"
            if in_use + gpus > self.resources.packed - held:
                self._unfinished.insert(0, trial)  # its share may have become smaller by the next call
                return None
        self._ray_ids[ray_id] = trial.trial_id
        self._gpus[trial.trial_id] = gpus
        fields = {"trial_id": trial.trial_id, "origin": trial.origin, "number": trial.number, "config": trial.config}
        is_finalist, stopping = trial.origin == "finalist", self.plan.early_stopping
        ending = {
            "metric": self.plan.metric,
            "patience": self.plan.patience if stopping else None,
            "divergence_factor": self.plan.divergence_factor if stopping else math.inf,
            "early_loss_epochs": [] if is_finalist else self._early_loss_epochs(),
        }
        given = {"gpus": gpus, "halve": gpus == 1 or not self.resources.packed, "redraw": is_finalist and self._redraw}
        given["promotable"] = self.plan.promote and trial.number is not None
        return fields | self._context | given | {"ending": ending}

    def _ask(self) -> Trial | str | None:
        """Journal a new trial: the start points first, then the probes, suggested trials and finalists."""
        plan, trials, asked = self.plan, self.record.trials, None
        started = self.searched >= min(len(self.space.start), plan.trials)
        if started and plan.probe and plan.early_stopping:
            asked = probe(self.space, plan, self.record)
        if asked is None and (stopped := self._promotable()) is not None:
            return self._promote(stopped)
        if asked is None and self.searched < plan.trials:
            asked = searched_trial(self.searched, self.space, plan, self.optimizer, self._untried(), self.record)
        elif asked is None:
            if any(not trial.ended for trial in trials.values() if trial.number is not None):
                return None  # finalists are chosen when all have ended
            if self._finalist_runs is None:
                self._finalist_runs = finalist_runs_left(self.record, plan)
            if not self._finalist_runs:  # a trial whose worker dies has to be scheduled again
                return FINISHED if all(trial.ended for trial in trials.values()) else None
            asked = finalist(*self._finalist_runs.pop(0), self.record)
        self._write("asked", **asked)
        return trials[asked["trial_id"]]

    def _promotable(self) -> Trial | None:
        """Return the stopped trial that goes on before another is asked for."""
        plan, trials = self.plan, self.record.trials.values()
        left = self.searched < plan.trials
        if not plan.promote or (not left and any(trial.origin == "finalist" for trial in trials)):
            return None
        if (stopped := promotable(self.rungs, self.record)) is not None or left:
            return stopped
        running = [trial for trial in trials if trial.number is not None and not trial.ended]
        seconds = spare_seconds(self.record, plan, running, self._budget_left(), self.resources.count)
        return best_stopped(self.record, plan, seconds, self._has_state)

    def _has_state(self, trial: Trial) -> bool:
        state = state_file(self.run_folder, trial.trial_id)
        return state.exists() or (self.mirror is not None and f"checkpoints/{state.name}" in self.mirror.elsewhere)

    def _promote(self, trial: Trial) -> Trial:
        """Journal that a stopped trial continues."""
        last = trial.decisions[-1]
        fields = {name: last[name] for name in ("epoch", "rung", "stratum", "value", "cutoff")}
        self.optimizer.reopen(trial)
        self._write("decision", trial_id=trial.trial_id, verdict=PROMOTED, **fields)
        return trial

    def _untried(self) -> dict[Key, dict[str, Any]]:
        """Return the configurations of a finite space that no trial has, by their keys."""
        if not self._every:
            return {}
        tried = {same(trial.params) for trial in self.record.trials.values() if trial.number is not None}
        return {key: params for key, params in self._every.items() if key not in tried}

    def _gpu_share(self, trial: Trial) -> float:
        # Only the last rows: to look at all takes seconds.
        known = (other for other in self.record.trials.values() if other.rows and not other.rows[0]["cache_hits"])
        last = [(other.config, other.rows[-1]) for other in known]
        measured = [
            (config, row["peak_memory_mb"], row["gpu_memory_mb"])
            for config, row in last
            if row["peak_memory_mb"] is not None and row["micro_batch"] == row["batch_size"]
        ]
        return self._packing.share(trial.config, measured)

    def _early_loss_epochs(self) -> list[int]:
        if self.plan.early_loss == "always":
            return list(range(1, self.plan.epochs + 1))
        return self.rungs.rungs if self.plan.early_stopping and self.plan.compared == "early_loss" else []

    # What Ray reports.

    def started(self, ray_id: str) -> None:
        """Journal that a trial runs."""
        trial_id = self._ray_ids[ray_id]
        self._write("started", trial_id=trial_id, gpus=self._gpus[trial_id])
        self.running[trial_id] = self.record.trials[trial_id]

    def result(self, ray_id: str, row: dict[str, Any], worker: str = "") -> bool:
        """Journal a row and what follows from it; return whether the trial continues."""
        trial = self.record.trials[self._ray_ids[ray_id]]
        self._failures[worker] = self._failures.get(worker, 0) + 1 if row["ends"] == "failed" else -math.inf
        if "epoch" not in row and row["ends"] == "out_of_memory" and self.resources.packed and trial.gpus < 1:
            self._packing.outgrown(trial.config)
            self._again(trial, row["reason"])
            return False
        if "epoch" not in row:
            return self._end(trial, row["ends"], row["reason"], row["error"])
        known = row["epoch"] <= len(trial.rows)
        replayed, checkpoint = row.pop("replayed", False), row.pop("checkpoint", False)
        if known and not replayed:  # trained again from an earlier checkpoint
            self._write("resumed", trial_id=trial.trial_id, from_epoch=row["epoch"] - 1)
        if not (known and replayed):
            self._write("epoch", trial_id=trial.trial_id, **row)
        if checkpoint:
            self._write("checkpoint", trial_id=trial.trial_id, epoch=row["epoch"])
        if row["ends"] is not None:
            return self._end(trial, row["ends"], row["reason"])
        decision = self._decide(trial, row["epoch"])
        if decision is not None and decision["verdict"] == "stop":
            return self._end(trial, "stopped", stop_reason(self.plan, decision))
        if decision is not None:
            self.optimizer.passed_rung(trial)
        if self.is_over():
            return self._end(trial, "interrupted", f"{self.halted}; {RESUME}")
        self.show(self, trial)
        self._write_tables()
        return True

    def lost(self, ray_id: str, error: str, *, hung: bool = False) -> None:
        """Schedule a trial again whose worker died, under another of Ray's ids, or give it up."""
        trial_id = self._ray_ids[ray_id]
        trial = self.record.trials[trial_id]
        self._failures[f"lost {trial_id}"] = 1  # if it ends here, as if on a slot of its own
        if hung and trial_id in self.running:
            self._end(trial, "failed", f"reported nothing for {self.plan.trial_timeout:g} s (trial_timeout)")
            return
        self._write("lost", trial_id=trial_id, started=trial_id in self.running, error=error)
        if trial.losses > LOST_ACTOR_RETRIES or trial.lost_starts > LOST_STARTS:
            if trial.status is None:
                self.started(ray_id)
            self._end(trial, *lost_end(trial, error), error)
            return
        began = self.running.pop(trial_id, None) is not None
        if not began:
            self._schedule_at = time.monotonic() + LOST_START_SECONDS
        died = f"died (retry {trial.losses} of {LOST_ACTOR_RETRIES})" if began else "died before the trial began"
        print(f"{trial_id}: its worker process {died}; the trial is scheduled again", file=sys.stderr)
        del self._gpus[trial_id]
        self._unfinished.insert(0, trial)

    def broken(self, ray_id: str, wrong: str) -> None:
        """Schedule a trial again whose GPU doesn't work; Ray's own trial goes on to hold that one."""
        trial_id = self._ray_ids[ray_id]
        gpus = self._again(self.record.trials[trial_id], wrong)
        print(f"{wrong}; it gets no more trials, and {trial_id} is scheduled again", file=sys.stderr)
        self._hold(gpus, f"no GPU works; the last one: {wrong}")

    def fails(self, ray_id: str, worker: str) -> bool:
        """Return whether a worker on which a trial has failed gets no more of them, since others of it failed too."""
        if self._failures[worker] < FAILURES_AT_FIRST or self.halted is not None:
            return False
        trial = self.record.trials[self._ray_ids[ray_id]]
        failed = f"the first {FAILURES_AT_FIRST} trials of a worker on {worker.partition(' ')[0]} all failed"
        print(f"{failed}; it gets no more trials; the last one: {trial.reason}", file=sys.stderr)
        self._hold(self._gpus[trial.trial_id], f"{failed}, and so did all others'; the last one: {trial.reason}")
        return True

    def _hold(self, gpus: float, why: str) -> None:
        """Note that a slot is held; end the search if none is left."""
        self._held, self._held_gpus = self._held + 1, self._held_gpus + gpus
        if not self.running and (self._held_gpus >= self.resources.packed > 0 or self._held >= self.resources.room):
            self.halted = why

    def _again(self, trial: Trial, error: str) -> float:
        """Schedule a trial again that could not run where it was; return its share of a GPU."""
        self._write("moved", trial_id=trial.trial_id, error=error)
        self.running.pop(trial.trial_id, None)
        self._unfinished.append(trial)  # not at once, perhaps to the next that does not work
        return self._gpus.pop(trial.trial_id)

    # What follows.

    def _decide(self, trial: Trial, epoch: int) -> Mapping[str, Any] | None:
        """Journal and return ASHA's decision on a searched trial at this epoch, unless an earlier start made one."""
        if not self.plan.early_stopping or trial.number is None:
            return None
        for made in reversed(trial.decisions):
            if made["epoch"] == epoch:
                return made
        kind, value = stratum(self.plan.strata, trial.config), value_at_rung(self.plan, trial.rows[:epoch])
        decision = self.rungs.decide(trial.trial_id, epoch, value, kind)
        if decision is None:
            return None
        if decision.verdict == "stop" and (trial.origin == "start" or trial.number == 0):  # which is the default
            decision = decision._replace(verdict="kept")
        in_own_units = {"value": as_loss(self.plan, value), "cutoff": as_loss(self.plan, decision.cutoff)}
        return self._write("decision", trial_id=trial.trial_id, epoch=epoch, **decision._asdict() | in_own_units)

    def _end(self, trial: Trial, status: str, reason: str, error: str | None = None) -> bool:
        self._write_end(trial, status, reason, error)
        if trial.origin != "finalist":
            self.optimizer.tell(trial)
        ended = (other.status for other in self.record.trials.values() if other.ended and other.number is not None)
        failing = sum(number > 0 for number in self._failures.values())
        everywhere = failing >= min(self.resources.count, self.resources.room, FAILURES_AT_FIRST)
        if everywhere and list(islice(ended, FAILURES_AT_FIRST + 1)) == ["failed"] * FAILURES_AT_FIRST:
            self.halted = f"the first {FAILURES_AT_FIRST} trials all failed; the last one: {reason}"
        self.show(self, trial)
        self._write_tables()
        return False

    def _write_end(self, trial: Trial, status: str, reason: str, error: str | None = None) -> None:
        self._write("ended", trial_id=trial.trial_id, status=status, reason=reason, error=error)
        self.running.pop(trial.trial_id, None)  # absent if it ran in an earlier start

    def _write(self, event: str, **fields: Any) -> dict[str, Any]:
        entry = self.journal.append(event, **fields)
        self.record.apply(entry)
        if self._live is not None and "trial_id" in entry:
            self._live.show(entry, self.record.trials[entry["trial_id"]], self.plan.metric)
        return entry

    def is_over(self) -> bool:
        """Return whether no more trials are to run; `halted` then says why."""
        if self.halted is None and self.mirror is not None:
            self.halted = self.mirror.taken
        if self.halted is None and self._budget_left() <= 0:
            self.halted = BUDGET_USED
        return self.halted is not None

    def _budget_left(self) -> float:
        """Return the seconds left of the time budget."""
        budget = self.plan.time_budget
        return math.inf if budget is None else budget - (self.journal.wall_s - self.started_wall_s)

    def _write_tables(self, *, now: bool = False) -> None:
        started = time.monotonic()
        if now or started > self._tables_due:
            write_tables(make_tables(self.record, self.plan.metric), self.run_folder)
            self.delete_checkpoints()
            ended = time.monotonic()
            self._tables_due = ended + max(TABLE_SECONDS, (ended - started) / TABLE_SHARE)
            self._report()

    def delete_checkpoints(self) -> None:
        """Delete the checkpoints that are no longer needed."""
        plan = self.plan
        promoting = plan.promote and (not self.finished or self.halted is not None)  # --resume may promote
        delete_unneeded(
            self.run_folder,
            self.record.trials,
            plan.metric,
            plan.checkpoint_bytes,
            self.mirror,
            promoting=promoting,
        )

    def run(self) -> bool:
        """Search until the trials, the time budget or the user end it; return False if it was interrupted.

        Each call is a new Ray experiment in a temporary folder: everything to resume is rebuilt from the journal.
        """
        trials = self.record.trials
        with run_folder(cache_folder(), self.run_folder) as features:
            self._context["features"] = str(features)
            try:
                fit(self, self._trainable)
            finally:
                for trial in [trial for trial in trials.values() if trial.status == "running"]:
                    why = self.halted or "the search was interrupted"  # halted while a worker was lost
                    self._write_end(trial, "interrupted", f"{why}; {RESUME}")
                self._write_tables(now=True)
                delete_temporary_files(self.run_folder)
                self.journal.close()
        if self.halted is not None:
            return True
        all_ended = self.searched >= self.plan.trials and all(trial.ended for trial in trials.values())
        return all_ended and not finalist_runs_left(self.record, self.plan)


def lost_end(trial: Trial, error: str) -> tuple[str, str]:
    """Return status and reason of a trial that is given up after its workers died, the last one with this error."""
    while_running = trial.losses > LOST_ACTOR_RETRIES
    died = f"its worker process died {count(trial.losses, 'time')}"
    if not while_running:
        died = f"its worker process died {count(trial.lost_starts, 'time')} before the trial began"
    if LOW_ON_MEMORY in error:
        return "out_of_memory", f"{died}; the last time Ray killed it because the machine was low on memory"
    if while_running and RAISED not in error:
        return "failed", f"{died}; the operating system may have killed it for lack of memory"
    last_line = error.strip().rpartition("\n")[2]
    return "failed", f"{died}; {last_line}"
