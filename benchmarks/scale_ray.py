"""What a search's driver takes for each epoch that Ray's actors report, and how that grows with the trials.

The real search on real actors, whose trials cost nothing: whatever time passes is the driver's and Ray's. Processor
time is counted, since other jobs on the machine hardly make it longer.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import dataclasses
import json
import math
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import tyro
import yaml
from ray import tune

from tuning.record.tables import SAMPLES, write_tables
from tuning.report import refresher, write
from tuning.search.cluster import Slots, ray_running
from tuning.search.driver import Search
from tuning.settings.config import SearchPlan
from tuning.settings.space_file import load
from tuning.show.progress import Progress

OURS = ("the search", "journal", "rungs", "suggestions", "progress", "tables", "report")
RAYS = ("Ray, the same thread", "Ray, the driver's other threads")


HALVES = ("train_loss", "train_eval_loss", "val_accuracy", "val_balanced_accuracy", "val_auroc")
QUARTERS = ("data_seconds", "prefix_seconds", "train_seconds", "evaluate_seconds")
CONSTANT = (  # of each epoch
    dict.fromkeys(HALVES, 0.5)
    | dict.fromkeys(QUARTERS, 0.25)
    | {"learning_rate": 0.1, "seconds": 1.0, "images": 600, "cache_hits": 600, "batch_size": 32, "micro_batch": 32}
    | {"trained_parameters": 1000, "parameters": 1000, "latency_ms": 1.0, "peak_memory_mb": None, "gpu_memory_mb": None}
)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Search through Ray among trials that cost nothing."""

    trials: int = 2_000
    """Start points and suggested trials."""
    epochs: int = 5
    """Of a trial that nothing ends early."""
    slots: int = 4
    """Actors at once; at most two a core."""
    early_stopping: bool = False
    """Whether ASHA ends trials."""


def loss(config: dict[str, Any], epoch: int) -> float:
    """Between 0.2 and about 2, least at a learning rate that depends on the depth, and a little better each epoch."""
    distance = abs(math.log10(config["learning_rate"]) + 2 + 0.3 * config["unfreeze_depth"])
    return 0.2 + 0.3 * distance + 0.1 * (config["augmentation"] == "strong") + math.exp(-epoch / 3)


def row(config: dict[str, Any], epoch: int, epochs: int) -> str:
    """What a worker says of a trial's epoch, as JSON."""
    value, ends = loss(config, epoch), "completed" if epoch == epochs else None
    said = {"epoch": epoch, "val_loss": value, "early_loss": value, "unfreeze_depth": config["unfreeze_depth"]}
    return json.dumps(said | CONSTANT | {"ends": ends, "reason": ends})


def resident_mb() -> float:
    """Memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class FreeTrial(tune.Trainable):  # type: ignore[misc]
    """In place of `FinetuneTrial`: says at once what a trial would."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        # Two actors a core. With a hundredth of one Ray was seen to start 30 workers at once on two busy cores.
        return tune.PlacementGroupFactory([{"CPU": 0.5}])

    def setup(self, config: dict[str, Any]) -> None:
        self._trial, self._epoch = config["config"], 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, str]:
        self._epoch += 1
        return {"row": row(self._trial, self._epoch, self._trial["epochs"])}


class Spent:
    """Processor seconds of this thread by part, each without the parts that it calls."""

    def __init__(self) -> None:
        self.seconds, self.last, self.calls = Counter[str](), dict[str, float](), Counter[str]()
        self._inner = [0.0]

    def counting(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted."""

        def counted(*given: Any, **named: Any) -> Any:
            begun = time.thread_time()
            self._inner.append(0.0)
            try:
                return call(*given, **named)
            finally:
                taken = time.thread_time() - begun
                self.last[part] = taken - self._inner.pop()
                self.seconds[part] += self.last[part]
                self.calls[part] += 1
                self._inner[-1] += taken

        return counted

    def count(self, part: str, owner: object, *methods: str) -> None:
        """Count an object's methods."""
        for name in methods:
            setattr(owner, name, self.counting(part, getattr(owner, name)))

    def now(self) -> Counter[str]:
        """Seconds so far by part, of all of `OURS` and `RAYS`."""
        thread, process = time.thread_time(), time.process_time()
        rays = (thread - sum(self.seconds.values()), process - thread)
        return Counter(self.seconds | dict(zip(RAYS, rays, strict=True)) | {"wall": time.perf_counter()})


def main() -> None:
    """Search and print."""
    flags = tyro.cli(Flags)
    settings = {"trials": flags.trials, "epochs": flags.epochs, "early_stopping": flags.early_stopping}
    plan = SearchPlan(name="scale", probe=False, finalists=0, metric="val_loss", concurrent=flags.slots, **settings)
    # These actors need no torch, and wait for no neighbours, whose actors have the low priority that Ray gives them.
    os.environ |= {"RAY_preload_python_modules": "", "RAY_worker_niceness": "0"}
    with tempfile.TemporaryDirectory() as folder, ray_running(plan) as resources:
        run = Path(folder) / plan.name
        search, spent = prepared(plan, run)
        resources()
        marks = watched(search, spent, flags.trials)
        with open(Path(folder) / "log.txt", "w") as log, contextlib.redirect_stdout(log):
            assert search.run()
        tell(search, spent, marks, run)


def prepared(plan: SearchPlan, run: Path) -> tuple[Search, Spent]:
    """A new run's search, the parts of which are counted."""
    run.mkdir()
    space, spent = load("quick"), Spent()
    document = {"settings": plan.model_dump(), "space": space.document, "provenance": {"fingerprint": "0"}}
    (run / "plan.yaml").write_text(yaml.safe_dump(document))
    images = [(label, split) for label in ("normal", "pneumonia") for split in ("train", "val", "test")]
    samples = pd.DataFrame([(f"{label}/{split}.png", label, split) for label, split in images])
    samples = samples.set_axis(["path", "label", "split"], axis=1).assign(file=samples[0], group=None, unit=0)
    write_tables({"samples": pa.Table.from_pandas(samples[SAMPLES.names], schema=SAMPLES)}, run)
    search = Search(
        plan,
        space,
        run,
        images={},
        weights={},
        resources=Slots(1, 0.0, plan.concurrent or 1),
        show=spent.counting("progress", Progress(plan, 0.69, 0.1, plan.concurrent)),
        report=spent.counting("report", refresher(run)),
        trainable=FreeTrial,
    )
    spent.count("the search", search, "next_trial", "started", "result", "lost")
    spent.count("journal", search.journal, "append")
    spent.count("rungs", search.rungs, "decide")
    spent.count("suggestions", search.optimizer, "ask", "tell", "passed_rung")
    spent.count("tables", search, "_write_tables")
    return search, spent


def watched(search: Search, spent: Spent, trials: int) -> list[Counter[str]]:
    """A list that takes in what was spent when the first trial and each further tenth of them start, and at the end."""
    marks: list[Counter[str]] = []
    started, result, counts = search.started, search.result, Counter[str]()

    def mark() -> None:
        marks.append(spent.now() + Counter({"epochs": counts["epochs"], "memory": int(resident_mb())}))

    def started_marked(ray_id: str) -> None:
        started(ray_id)
        if counts["trials"] % max(1, trials // 10) == 0:
            mark()
        counts["trials"] += 1

    def result_marked(ray_id: str, said: dict[str, Any]) -> bool:
        goes_on = result(ray_id, said)
        counts["epochs"] += 1
        if counts["trials"] == trials and not search.running:
            mark()
        return goes_on

    search.started, search.result = started_marked, result_marked  # type: ignore[assignment, method-assign]
    return marks


def tell(search: Search, spent: Spent, marks: list[Counter[str]], run: Path) -> None:
    """Print what was spent."""
    spans = {"all": (marks[0], marks[-1]), "first tenth": (marks[0], marks[1]), "last": (marks[-2], marks[-1])}
    epochs = {name: after["epochs"] - before["epochs"] for name, (before, after) in spans.items()}
    print(f"{search.searched} trials, {epochs['all']} epochs, {search.resources.count} actors, {os.cpu_count()} cores")
    print(f"{'ms an epoch':<34}" + "".join(f"{name:>13}" for name in spans))
    for part in (*OURS, *RAYS, "wall"):
        per_epoch = [1000 * (after[part] - before[part]) / epochs[name] for name, (before, after) in spans.items()]
        print(f"{part:<34}" + "".join(f"{value:>13.2f}" for value in per_epoch))
    print(f"memory: {marks[0]['memory']} MiB at the first trial, {marks[-1]['memory']} at the last result")
    print(f"tables: {spent.seconds['tables']:.1f} s in all, {spent.last['tables']:.2f} the last time")
    begun = time.thread_time()
    size = write(run).stat().st_size / 2**20
    at_end = time.thread_time() - begun
    print(f"report: {spent.seconds['report']:.1f} s meanwhile, {at_end:.2f} at the end, for {size:.1f} MiB")


if __name__ == "__main__":
    main()
