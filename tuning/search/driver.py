"""The driver: hands trials to Ray, journals what they report, decides, and goes on after a crash."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray import tune

from tuning.record.journal import Journal, Trial, best_epoch, loss_like, read_record
from tuning.record.mirror import Mirror
from tuning.record.tables import make_tables, write_tables
from tuning.search.checkpoints import best_file, state_file
from tuning.search.cluster import Slots, gpu_share
from tuning.search.finalists import most_epochs, runs_left
from tuning.search.optimizer import LiveStudy, Optimizer, Prior
from tuning.search.stopping import Rungs, compared_value, stratum
from tuning.search.trainable import FinetuneTrial
from tuning.search.tuner import FINISHED, fit
from tuning.settings.config import SearchPlan, TrialConfig, cache_folder
from tuning.settings.space import Space, backbones, middle, trial_values
from tuning.training.features import run_folder

TABLE_SECONDS, TABLE_SHARE = 5.0, 0.05  # between writings of the tables; the driver's time for it, at most
KEPT_CHECKPOINTS = 5  # ended trials whose best weights are kept
LOST_ACTOR_RETRIES = 3
LOST_STARTS = 10  # times that a trial's worker may be gone before the trial has begun there
LOST_START_SECONDS = 1.0  # before trials are handed out again: a node that dies takes several workers
LOW_ON_MEMORY = "running low on memory"  # says Ray where its memory monitor has killed a worker
RAISED = "RayTaskError"  # in the text of an error that was raised in a worker, and isn't the worker's end
FAILURES_AT_FIRST = 4  # if the first so many trials all fail, something is wrong with all of them


class Search:
    """One run's state while it is searched: journal, record, rungs and study, rebuilt from the journal at each start.

    Args:
        plan: the settings.
        space: the search space.
        run: the run's folder; holds `samples.parquet`.
        images: folder of decoded images by image size.
        weights: weight file by backbone.
        resources: what a trial is given.
        show: called with each trial that has reported or ended.
        priors: of `optimizer.read_priors`; a search that goes on has them in its journal.
        resumed: whether the run was there before.
        report: called after the tables have been written anew; bounds its own share of the time.
        redraw: whether finalists' runs draw training and validation anew: not where the user has fixed the split.
        mirror: keeps the run's copy in a storage, if it lies in one.
        run_id: tells this run from another one of the same name.
        clock: seconds; simulated ones in benchmarks.
        trainable: what runs in Ray's actors; one that costs nothing in benchmarks.
    """

    def __init__(
        self,
        plan: SearchPlan,
        space: Space,
        run: Path,
        *,
        images: dict[int, Path],
        weights: dict[str, Path | None],
        resources: Slots,
        show: Callable[["Search", Trial], None],
        priors: Sequence[Prior] = (),
        resumed: bool = False,
        report: Callable[[], object] = lambda: None,
        redraw: bool = False,
        mirror: Mirror | None = None,
        run_id: str = "",
        clock: Callable[[], float] = time.monotonic,
        trainable: type[tune.Trainable] = FinetuneTrial,
    ):
        self.plan, self.space, self.run_folder, self.resources, self.show = plan, space, run, resources, show
        path = run / "journal.jsonl"
        self.journal = Journal(path, clock)
        self.record = read_record(path)
        self.started_wall_s = self.journal.wall_s
        self._live = None
        if plan.optuna_storage is not None:
            self._live = LiveStudy(plan.optuna_storage, plan.name, space, anew=resumed or bool(self.record.trials))
            for trial in self.record.trials.values():
                ends = [{"event": "ended", "trial_id": trial.trial_id, "status": trial.status}] if trial.ended else []
                for event in ({"event": "asked", "trial_id": trial.trial_id}, *trial.rows, *ends):
                    self._show_live(event)
        if not (self.record.trials or self.record.priors) and priors:
            self._write("priors", priors=list(priors))
        self.optimizer = Optimizer(
            space, seed=plan.seed, metric=plan.metric, sampler=plan.sampler, priors=self.record.priors
        )
        self.rungs = Rungs(grace_epochs=plan.grace_epochs, reduction_factor=plan.reduction_factor, epochs=plan.epochs)
        self._redraw, self._report, self._mirror, self._trainable = redraw, report, mirror, trainable
        self.running: dict[str, Trial] = {}  # in the order in which they started
        self.halted: str | None = None  # why no more trials are to be started
        self._tables_due = self._hand_out_at = -math.inf
        self._ray_ids: dict[str, str] = {}
        self._gpus: dict[str, float] = {}  # what each trial is given
        self._context = {
            "run": str(run.resolve()),
            "images": {str(size): str(folder) for size, folder in images.items()},
            "weights": {name: None if file is None else str(file) for name, file in weights.items()},
            "threads": resources.cpus,
            "cache_bytes": plan.cache_bytes,
            "device": "cuda" if resources.gpus else "cpu",
            "storage": None if mirror is None else mirror.uri,
            "driver": None if mirror is None else mirror.claim,
            "run_id": run_id,
            "home": None if mirror is None else ray.get_runtime_context().get_node_id(),
        }
        self._ending = {
            "metric": plan.metric,
            "patience": plan.patience if plan.early_stopping else None,
            "divergence_factor": plan.divergence_factor if plan.early_stopping else math.inf,
            "early_loss_epochs": self._early_loss_epochs(),
        }
        self._delete_half_written()
        self._unfinished = self._rebuild()
        probed = {trial.config["backbone"] for trial in self.record.trials.values() if trial.origin == "probe"}
        wanted = backbones(space) if plan.probe and plan.early_stopping else []
        self._unprobed = [backbone for backbone in wanted if backbone not in probed]
        self._unjudged: list[tuple[Trial, int]] | None = None  # finalists' runs, once the others have ended

    def _early_loss_epochs(self) -> list[int]:
        if self.plan.early_loss == "always":
            return list(range(1, self.plan.epochs + 1))
        return self.rungs.rungs if self.plan.early_stopping and self.plan.compared == "early_loss" else []

    @property
    def searched(self) -> int:
        """Start points and suggested trials so far."""
        return sum(trial.number is not None for trial in self.record.trials.values())

    @property
    def mirrored(self) -> bool:
        """Whether the run's copy is kept in a storage."""
        return self._mirror is not None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Ray pickles what it is given for a `Tuner.restore`, which is never called."""
        return object, ()

    def _rebuild(self) -> list[Trial]:
        """Bring rungs and study to where the journal ends; returns the trials that have to go on."""
        decisions = [decision for trial in self.record.trials.values() for decision in trial.decisions]
        for row in sorted(decisions, key=lambda row: int(row["seq"])):
            self.rungs.enter(row["trial_id"], row["rung"], row["stratum"], self._less_is_better(row["value"]))
        unfinished = []
        for trial in self.record.trials.values():
            if not trial.ended:  # a journalled stop or end is final even where the crash came before `ended`
                if trial.rows and trial.rows[-1]["ends"] is not None:
                    self._write_end(trial, trial.rows[-1]["ends"], trial.rows[-1]["reason"])
                elif trial.decisions and trial.decisions[-1]["verdict"] == "stop":
                    self._write_end(trial, "stopped", stop_reason(self.plan, trial.decisions[-1]))
                else:
                    unfinished.append(trial)
            if trial.origin != "finalist":
                self.optimizer.remember(trial)
        return unfinished

    # What Ray asks and tells.

    def next_trial(self, ray_id: str) -> dict[str, Any] | str | None:
        """The next trial's configuration for Ray, or FINISHED; null: not now, for no GPU has room for it."""
        if self.is_over():
            return FINISHED
        if time.monotonic() < self._hand_out_at:
            return None
        if self._unfinished:
            trial = self._unfinished.pop(0)
        elif self._unprobed:
            trial = self._ask_probe(self._unprobed.pop(0))
        elif (number := self.searched) < self.plan.trials:
            trial = self._ask(number)
        elif any(not trial.ended for trial in self.record.trials.values() if trial.number is not None):
            return None  # finalists are chosen when all have ended
        elif judged := self._next_finalist():
            trial = self._ask_finalist(*judged)
        elif any(not trial.ended for trial in self.record.trials.values()):
            return None  # one whose worker is lost has to be handed out again
        else:
            return FINISHED
        gpus = self.resources.gpus
        if self.resources.packed:
            gpus = self._gpu_share(trial)
            in_use = sum(share for other, share in self._gpus.items() if not self.record.trials[other].ended)
            if in_use + gpus > self.resources.packed:
                self._unfinished.insert(0, trial)  # its share may be smaller when it is looked at again
                return None
        self._ray_ids[ray_id] = trial.trial_id
        self._gpus[trial.trial_id] = gpus
        named = {"trial_id": trial.trial_id, "origin": trial.origin, "number": trial.number, "config": trial.config}
        finalist = trial.origin == "finalist"
        ending = self._ending | ({"early_loss_epochs": []} if finalist else {})
        return named | self._context | {"gpus": gpus, "ending": ending, "redraw": finalist and self._redraw}

    def _gpu_share(self, trial: Trial) -> float:
        others = self.record.trials.values()
        last = [(other.config, other.rows[-1]) for other in others if other.rows]  # of all rows it would take seconds
        measured = [
            (config, row["peak_memory_mb"], row["gpu_memory_mb"])
            for config, row in last
            if row["peak_memory_mb"] is not None and row["micro_batch"] == row["batch_size"]
        ]
        return gpu_share(trial.config, measured)

    def _ask(self, number: int) -> Trial:
        start = self.space.start[number] if number < len(self.space.start) else None
        params = self.optimizer.ask(number, start)
        config = TrialConfig(**trial_values(self.space, params), epochs=self.plan.epochs, seed=self.plan.seed)
        trial_id = f"t{number:05d}"
        origin = "suggested" if start is None else "start"
        self._write("asked", trial_id=trial_id, number=number, origin=origin, params=params, config=config.model_dump())
        return self.record.trials[trial_id]

    def _ask_probe(self, backbone: str) -> Trial:
        params = middle(self.space, {"backbone": backbone, "unfreeze_depth": 0, "augmentation": "none"})
        values = trial_values(self.space, params) | {"backbone": backbone, "unfreeze_depth": 0, "augmentation": "none"}
        config = TrialConfig(**values, epochs=1, seed=self.plan.seed)
        return self._ask_beside("probe", params, config.model_dump())

    def _next_finalist(self) -> tuple[Trial, int] | None:
        if self._unjudged is None:
            self._unjudged = self._finalists()
        return self._unjudged.pop(0) if self._unjudged else None

    def _finalists(self) -> list[tuple[Trial, int]]:
        """Trials to be trained again and their seeds, seed by seed, without what has been asked for already."""
        trials, plan = self.record.trials, self.plan
        taken = sum(len(trial.rows) for trial in trials.values() if trial.number is not None)
        table = make_tables(self.record, plan.metric)["trials"].to_pandas()
        asked = {  # also what has not begun yet, which no table has
            (str(trial.finalist_of), int(trial.config["seed"]))
            for trial in trials.values()
            if trial.origin == "finalist"
        }
        return [(trials[trial_id], seed) for trial_id, seed in runs_left(table, plan, asked, most_epochs(plan, taken))]

    def _ask_finalist(self, judged: Trial, seed: int) -> Trial:
        return self._ask_beside("finalist", judged.params, judged.config | {"seed": seed}, finalist_of=judged.trial_id)

    def _ask_beside(self, origin: str, params: dict[str, Any], config: dict[str, Any], **named: str) -> Trial:
        """A trial that is none of the search's own: it has no number."""
        trial_id = f"{origin[0]}{sum(trial.origin == origin for trial in self.record.trials.values()):05d}"
        self._write("asked", trial_id=trial_id, number=None, origin=origin, params=params, config=config, **named)
        return self.record.trials[trial_id]

    def started(self, ray_id: str) -> None:
        trial_id = self._ray_ids[ray_id]
        self._write("started", trial_id=trial_id, gpus=self._gpus[trial_id])
        self.running[trial_id] = self.record.trials[trial_id]

    def result(self, ray_id: str, row: dict[str, Any]) -> bool:
        """Journal a row and what follows from it; true if the trial goes on."""
        trial = self.record.trials[self._ray_ids[ray_id]]
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
            return self._end(trial, "interrupted", f"{self.halted}; --resume goes on with it")
        self.show(self, trial)
        self._write_tables()
        return True

    def lost(self, ray_id: str, error: str, *, hung: bool = False) -> None:
        """A trial's worker process is gone: the trial is handed out again, under another of Ray's ids, or given up."""
        trial_id = self._ray_ids[ray_id]
        trial = self.record.trials[trial_id]
        if hung and trial_id in self.running:
            self._end(trial, "failed", f"reported nothing for {self.plan.trial_timeout:g} s (trial_timeout)")
            return
        self._write("lost", trial_id=trial_id, started=trial_id in self.running, error=error)
        if trial.losses > LOST_ACTOR_RETRIES or trial.lost_starts > LOST_STARTS:
            if trial.status is None:
                self.started(ray_id)
            self._end(trial, *lost_end(trial, error), error)
            return
        times = f"{trial.losses} of {LOST_ACTOR_RETRIES} times" if trial_id in self.running else "before it began"
        print(f"{trial_id}: its worker process was lost, {times}; it is handed out again", file=sys.stderr)
        if self.running.pop(trial_id, None) is None:
            self._hand_out_at = time.monotonic() + LOST_START_SECONDS
        del self._gpus[trial_id]
        self._unfinished.insert(0, trial)

    # What follows.

    def _decide(self, trial: Trial, epoch: int) -> Mapping[str, Any] | None:
        """ASHA's decision on a trial of the search at this epoch, journalled, or the one of an earlier start."""
        if not self.plan.early_stopping or trial.number is None:
            return None
        for made in trial.decisions:
            if made["epoch"] == epoch:
                return made
        value = self._compared_at(trial.rows[:epoch])
        decision = self.rungs.decide(trial.trial_id, epoch, value, stratum(self.plan.strata, trial.config))
        if decision is None:
            return None
        return self._write(
            "decision",
            trial_id=trial.trial_id,
            epoch=epoch,
            rung=decision.rung,
            stratum=decision.stratum,
            value=self._less_is_better(value),
            cutoff=self._less_is_better(decision.cutoff),
            verdict=decision.verdict,
        )

    def _compared_at(self, rows: Sequence[Mapping[str, Any]]) -> float | None:
        """What a rung compares after these epochs, less being better."""
        if self.plan.compared == "early_loss":
            return rows[-1]["early_loss"]  # type: ignore[no-any-return]
        metric = self.plan.metric
        losses = [self._less_is_better(None if row["val_loss"] is None else row[metric]) for row in rows]
        return compared_value(losses, self.plan.compared)

    def _less_is_better(self, value: float | None) -> float | None:
        """From the units of what is compared to less-is-better, and back."""
        if value is None or self.plan.compared == "early_loss":
            return value
        return loss_like(self.plan.metric, value)

    def _end(self, trial: Trial, status: str, reason: str, error: str | None = None) -> bool:
        self._write_end(trial, status, reason, error)
        if trial.origin != "finalist":
            self.optimizer.tell(trial)
        ended = (other.status for other in self.record.trials.values() if other.ended and other.number is not None)
        if list(islice(ended, FAILURES_AT_FIRST + 1)) == ["failed"] * FAILURES_AT_FIRST:
            self.halted = f"the first {FAILURES_AT_FIRST} trials all failed; the last one: {reason}"
        self.show(self, trial)
        self._write_tables()
        return False

    def _write_end(self, trial: Trial, status: str, reason: str, error: str | None = None) -> None:
        self._write("ended", trial_id=trial.trial_id, status=status, reason=reason, error=error)
        self.running.pop(trial.trial_id, None)  # not there where an earlier start had run it

    def _write(self, event: str, **fields: Any) -> dict[str, Any]:
        entry = self.journal.append(event, **fields)
        self.record.apply(entry)
        self._show_live(entry)
        return entry

    def _show_live(self, event: Mapping[str, Any]) -> None:
        """Copy an event to the live study; a storage that fails costs the copy, not the search."""
        if self._live is None or "trial_id" not in event:
            return
        try:
            self._live.show(event, self.record.trials[event["trial_id"]], self.plan.metric)
        except Exception as error:
            print(f"optuna_storage: {type(error).__name__}: the live study ends here", file=sys.stderr)
            self._live = None

    def is_over(self) -> bool:
        """Whether no more is to be done; `halted` then says why."""
        if self.halted is None and self._mirror is not None:
            self.halted = self._mirror.taken
        if self.halted is None and self._budget_over():
            self.halted = "the time budget is over"
        return self.halted is not None

    def _budget_over(self) -> bool:
        budget = self.plan.time_budget
        return budget is not None and self.journal.wall_s - self.started_wall_s >= budget

    def _write_tables(self, *, now: bool = False) -> None:
        started = time.monotonic()
        if now or started > self._tables_due:
            write_tables(make_tables(self.record, self.plan.metric), self.run_folder)
            self.delete_checkpoints()
            ended = time.monotonic()
            self._tables_due = ended + max(TABLE_SECONDS, (ended - started) / TABLE_SHARE)
            self._report()

    def delete_checkpoints(self) -> None:
        """Of ended trials keep the best few's best weights, within `checkpoint_bytes`; the worst of them go first."""
        folder = self.run_folder / "checkpoints"
        sizes = {path.name: path.stat().st_size for path in folder.glob("[!.]*")}
        if self._mirror is not None:
            sizes = {Path(name).name: size for name, size in self._mirror.elsewhere.items()} | sizes
        named = sorted({name.partition(".")[0] for name in sizes})  # trials with files
        trials = [self.record.trials[trial_id] for trial_id in named if trial_id in self.record.trials]
        state, best = (
            {each.trial_id: file("", each.trial_id).name for each in trials} for file in (state_file, best_file)
        )
        total = sum(sizes.get(state[trial.trial_id], 0) for trial in trials if not trial.ended)
        for place, trial in enumerate(sorted((trial for trial in trials if trial.ended), key=self._rank)):
            self._delete_checkpoint(state[trial.trial_id])
            size = sizes.get(best[trial.trial_id], 0)
            if place >= KEPT_CHECKPOINTS or trial.number is None or total + size > self.plan.checkpoint_bytes:
                self._delete_checkpoint(best[trial.trial_id])
            else:
                total += size

    def _delete_half_written(self) -> None:
        """Delete the temporary files of writers that were killed: in folders of the run's own, whatever is hidden."""
        for pattern in (".*.[0-9]*", "checkpoints/.*", "predictions/.*"):
            for path in self.run_folder.glob(pattern):
                path.unlink(missing_ok=True)

    def _delete_checkpoint(self, name: str) -> None:
        (self.run_folder / "checkpoints" / name).unlink(missing_ok=True)
        if self._mirror is not None and f"checkpoints/{name}" in self._mirror.elsewhere:
            self._mirror.forget(f"checkpoints/{name}")

    def _rank(self, trial: Trial) -> tuple[bool, float]:
        """Finalists' runs come last: what they were run for is in the tables."""
        best = best_epoch(trial.rows, self.plan.metric)
        loss = math.inf if best is None else loss_like(self.plan.metric, best[self.plan.metric])
        return trial.number is None, loss

    def run(self) -> bool:
        """Search until the trials, the budget or the user end it; false where it was interrupted.

        Each call is a fresh Ray experiment in a temporary folder: what goes on is rebuilt from the journal.
        """
        with run_folder(cache_folder(), self.run_folder) as features:
            self._context["features"] = str(features)
            self._fit()
        everything = self.searched >= self.plan.trials and not self._finalists()
        return self.halted is not None or (everything and all(trial.ended for trial in self.record.trials.values()))

    def _fit(self) -> None:
        try:
            fit(self, self._trainable)
        finally:
            running = [trial for trial in self.record.trials.values() if trial.status == "running"]
            for trial in running:
                why = self.halted or "the search was interrupted"  # halted while a trial's worker was lost
                self._write_end(trial, "interrupted", f"{why}; --resume goes on with it")
            self._write_tables(now=True)
            self._delete_half_written()
            self.journal.close()


def lost_end(trial: Trial, error: str) -> tuple[str, str]:
    """Status and reason of a trial that is given up since its workers were lost; the last of them with this error."""
    often = f"its worker process was lost {trial.losses} times"
    if trial.losses <= LOST_ACTOR_RETRIES:
        often = f"the worker process that it was given was gone {trial.lost_starts} times before it began"
    raised = trial.losses <= LOST_ACTOR_RETRIES or RAISED in error
    cause = error.strip().rpartition("\n")[2] if raised else "the system may have killed it for lack of memory"
    if LOW_ON_MEMORY in error:
        return "out_of_memory", f"{often}: the machine was low on memory, and Ray ended it"
    return "failed", f"{often}; {cause}"


def stop_reason(plan: SearchPlan, decision: Mapping[str, Any]) -> str:
    """Why ASHA stopped a trial, in a sentence with the numbers."""
    words = {"best": "best {}", "last": "{}", "mean": "mean of the last two {}", "early_loss": "early_loss"}
    what = words[plan.compared].format(plan.metric)
    if decision["value"] is None:
        return f"{what} could not be computed by epoch {decision['rung']}"
    among = "" if decision["stratum"] == "all" else f" of {decision['stratum']}"
    value, cutoff = f"{decision['value']:.4g}", f"{decision['cutoff']:.4g}"
    return f"{what} {value} by epoch {decision['rung']}, where the cut-off{among} was {cutoff}"
