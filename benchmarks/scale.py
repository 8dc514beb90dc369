"""How a search's own work grows with its trials: suggestions, the journal, memory.

Trials cost nothing: each epoch's loss is a formula of the configuration, told to the real `search.Search` in simulated
time. The journal lies in memory (/dev/shm), so its fsync isn't measured.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import heapq
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tyro

from benchmarks.scale_ray import resident_mb, row
from tuning.record.tables import make_tables
from tuning.search.cluster import Slots
from tuning.search.driver import Search
from tuning.settings.config import SearchPlan
from tuning.settings.space_file import load


@dataclasses.dataclass(frozen=True)
class Flags:
    """Search among many trials that cost nothing."""

    trials: int = 10_000
    """Start points and suggested trials."""
    epochs: int = 20
    """Of a trial that nothing ends early."""
    slots: int = 256
    """Simulated trials at once."""
    early_stopping: bool = False
    """Whether ASHA ends trials."""


def main() -> None:
    """Search and print."""
    flags = tyro.cli(Flags)
    settings = {"trials": flags.trials, "epochs": flags.epochs, "early_stopping": flags.early_stopping}
    plan = SearchPlan(name="scale", probe=False, metric="val_loss", **settings)
    clock = SimpleNamespace(now=0.0)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        search = Search(
            plan,
            load("quick"),
            Path(folder),
            images={},
            weights={},
            resources=Slots(1, 0.0, flags.slots),
            show=lambda search, trial: None,
            clock=lambda: float(clock.now),
        )
        running: list[tuple[float, int, int]] = []  # end of the epoch, ticket, epoch
        configs: dict[int, dict[str, Any]] = {}
        tickets, asking, epochs, started = itertools.count(), [], 0, time.perf_counter()
        before = None
        while True:
            while len(running) < flags.slots:
                ticket, begun = next(tickets), time.perf_counter()
                named = search.next_trial(str(ticket))
                asking.append(time.perf_counter() - begun)
                if not isinstance(named, dict):
                    break
                search.started(str(ticket))
                configs[ticket] = named["config"]
                heapq.heappush(running, (clock.now + 1, ticket, 1))
            if not running:
                break
            if before is None and search.searched >= flags.trials // 10:  # what grows once only has grown by now
                before = (search.searched, resident_mb())
            clock.now, ticket, epoch = heapq.heappop(running)
            epochs += 1
            if search.result(str(ticket), json.loads(row(configs[ticket], epoch, flags.epochs))):
                heapq.heappush(running, (clock.now + 1, ticket, epoch + 1))
            else:
                del configs[ticket]
        seconds, memory = time.perf_counter() - started, resident_mb()
        assert before is not None
        print(f"{search.searched} trials, {epochs} epochs, {flags.slots} slots: {seconds:.0f} s")
        print(f"memory grew by {(memory - before[1]) * 1024 / (search.searched - before[0]):.1f} KiB a trial")
        for low, high in ((0, 200), (1000, 2000), (flags.trials - 1000, flags.trials)):
            part = [value * 1000 for value in asking[low:high]]
            if part:
                middle = statistics.median(part)
                print(f"a suggestion, trials {low} to {high}: median {middle:.0f} ms, at most {max(part):.0f}")
        begun = time.perf_counter()
        make_tables(search.record, plan.metric)
        print(f"tables made in {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main()
