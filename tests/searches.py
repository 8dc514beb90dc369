"""Searches on a tiny network, as `run_search.py` makes them, without the command; and the workers of their trials."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from ray import cloudpickle, tune

from tuning.checks.audit import load_checked
from tuning.search.cluster import Slots
from tuning.search.driver import Search
from tuning.search.plans import write_run
from tuning.search.trainable import FinetuneTrial
from tuning.settings.config import SearchPlan, cache_folder
from tuning.settings.space_file import parse
from tuning.training.outputs import run_folder

PARAMETERS = {
    "unfreeze_depth": {"type": "categorical", "choices": [0, 1, 5]},
    "learning_rate": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
    "augmentation": {"type": "categorical", "choices": ["none", "medium"]},
}
FIXED = {"backbone": "test_resnet", "image_size": 32, "batch_size": 8}


def make_run(folder, data, *, parameters=PARAMETERS, fixed=FIXED, start=(), weights=None, **settings):
    """A run ready to be searched: returns a function that makes its Search."""
    space = parse({"parameters": parameters, "fixed": fixed, "start": list(start)}, "test")
    given = {"name": folder.name, "data": str(data), "trials": 8, "epochs": 4, "grace_epochs": 1, "weights": "random"}
    given |= {"probe": False}
    plan = SearchPlan(**given | settings)
    checked = load_checked(plan, [32])
    write_run(folder, plan, space, checked.samples, checked.audit, checked.fingerprint)
    ended = []

    def search(count=1, priors=(), redraw=False, trainable=FinetuneTrial, **changed):
        return Search(
            plan.model_copy(update=changed),
            space,
            folder,
            images=checked.folders,
            weights=weights or {"test_resnet": None},
            resources=Slots(1, 0.0, count),
            show=lambda search, trial: ended.append(trial.trial_id) if trial.ended else None,
            priors=priors,
            redraw=redraw,
            trainable=trainable,
        )

    search.ended = ended
    return search


def run_here(search):
    """As `search.run` with one slot, in this process: no worker has to start, which takes ten seconds of a core."""
    with run_folder(cache_folder(), search.run_folder) as features:
        search._context["features"] = str(features)
        worker, number = None, 0
        while (given := search.next_trial(f"ray{number}")) != "FINISHED":
            if worker is None:
                worker = FinetuneTrial(given)
            else:
                worker.reset_config(given)
            search.started(f"ray{number}")
            while search.result(f"ray{number}", json.loads(worker.step()["row"])):
                pass
            number += 1
        if worker is not None:
            worker.cleanup()
    search.finished = True
    search._write_tables(now=True)
    search.journal.close()


class FreeTrial(tune.Trainable):
    """A trial that costs nothing, where training isn't what is tested: its worker starts without torch, in a second."""

    @classmethod
    def default_resource_request(cls, config):
        return tune.PlacementGroupFactory([{"CPU": 1}])

    def setup(self, config):
        self._epochs, self._epoch = config["config"]["epochs"], 0

    def reset_config(self, new_config):
        self.setup(new_config)
        return True

    def step(self):
        self._epoch += 1
        row = dict.fromkeys(("train_loss", "train_eval_loss", "val_loss", "early_loss"), 1 / self._epoch)
        row |= dict.fromkeys(
            ("val_tempered_loss", "val_accuracy", "val_balanced_accuracy", "val_auroc", "learning_rate", "seconds"), 0.5
        )
        row |= dict.fromkeys(("data_seconds", "prefix_seconds", "train_seconds", "evaluate_seconds"), 0.125)
        row |= dict.fromkeys(("cache_hits", "images", "micro_batch", "batch_size", "trained_parameters"), 8)
        ends = "completed" if self._epoch == self._epochs else None
        row |= {"peak_memory_mb": None, "gpu_memory_mb": None, "parameters": 8, "latency_ms": 1.0, "unfreeze_depth": 0}
        return {"row": json.dumps(row | {"epoch": self._epoch, "ends": ends, "reason": ends})}


class WorseTrial(FreeTrial):
    """One that is worse than those before it, so that the second is promoted once the fourth has reached its rung."""

    def step(self):
        row = json.loads(super().step()["row"])
        worse = dict.fromkeys(("val_loss", "early_loss"), row["val_loss"] + self.config["number"])
        return {"row": json.dumps(row | worse)}


class SlowTrial(FreeTrial):
    """One that leaves the processor to others."""

    def step(self):
        time.sleep(0.1)
        return super().step()


class OnAGpu(FreeTrial):
    """One on a pretended GPU. The second doesn't work, or its trials fail, or none works: by the run's name."""

    @classmethod
    def default_resource_request(cls, config):
        return tune.PlacementGroupFactory([{"CPU": 1, "GPU": 1}])

    def step(self):
        gpu = os.environ["CUDA_VISIBLE_DEVICES"]
        name = Path(self.config["run"]).name
        if gpu == "1" and name == "one-fails":
            return {
                "row": json.dumps({"ends": "failed", "reason": "FileNotFoundError: no such file", "error": "lines"})
            }
        if gpu == "1" or name == "none-works":
            return {"row": json.dumps({"broken": f"GPU {gpu} of here: CUDA error: unspecified launch failure"})}
        time.sleep(0.05)
        return super().step()


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers don't find the tests' modules


ACTORS = (
    b"ray::FinetuneTrial",
    b"ray::FreeTrial",
    b"ray::WorseTrial",
    b"ray::SlowTrial",
    b"ray::OnAGpu",
    b"ray::ResourceTrainable",
)


def workers(titles=ACTORS):
    """Process ids of the trial actors, or of Ray's workers with other titles, below this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(titles):
                raylet = int((folder / "stat").read_text().rsplit(")")[-1].split()[1])
                if int(Path(f"/proc/{raylet}/stat").read_text().rsplit(")")[-1].split()[1]) == os.getpid():
                    found.append(int(folder.name))
    return found
