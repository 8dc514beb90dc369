"""What a large network's checkpoints cost on a slow disk: VGG16, all stages, AdamW, 2.7 GB a checkpoint.

The worker of the search itself trains it on generated images; writing takes as long as on a disk of so many bytes a
second. Printed: checkpoints, and the share of the time that they took.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from tuning.checks.audit import load_checked
from tuning.search import worker as worker_module
from tuning.search.plans import write_run
from tuning.search.worker import Worker
from tuning.settings.config import SearchPlan, TrialConfig
from tuning.settings.space_file import parse


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure what checkpoints cost."""

    backbone: str = "vgg16"
    """timm model, with random weights."""
    image_size: int = 32
    """Side in pixels."""
    minutes: float = 10.0
    """Time to train."""
    rate: float = 1e8
    """Bytes a second that the disk takes."""


def main() -> None:
    """Train for some minutes, and print what checkpoints took."""
    flags = tyro.cli(Flags)
    plan = SearchPlan(name="run", weights="random", on_leak="warn")
    space = parse({"fixed": {"backbone": flags.backbone}, "parameters": {}}, "benchmark")
    checked = load_checked(plan, [flags.image_size])
    trial = TrialConfig(
        backbone=flags.backbone, unfreeze_depth=5, image_size=flags.image_size, epochs=10_000, augmentation="light"
    )
    save, writing = worker_module.save, []

    def slow(run: Path, trial_id: str, state: Any, *others: Any, ended: bool) -> None:
        began = time.monotonic()
        save(run, trial_id, state, *others, ended=ended)
        n_bytes = sum(tensor.nbytes for tensor in state.tensors.values())
        time.sleep(max(0.0, n_bytes / flags.rate - (time.monotonic() - began)))
        writing.append((time.monotonic() - began, n_bytes))

    worker_module.save = slow
    with tempfile.TemporaryDirectory() as place:
        write_run(Path(place) / "run", plan, space, checked.samples, checked.audit, checked.fingerprint)
        began, epochs, copying = time.monotonic(), 0, 0.0
        worker = Worker(
            {
                **{"run": f"{place}/run", "images": {str(flags.image_size): str(checked.folders[flags.image_size])}},
                **{"weights": {flags.backbone: None}, "digests": {}, "features": f"{place}/features", "run_id": ""},
                **{
                    "cache_bytes": 0,
                    "threads": 2,
                    "gpus": 0,
                    "device": "cpu",
                    "deterministic": False,
                    "halve": True,
                    "graphs": False,
                },
                **{"redraw": False, "promotable": False, "storage": None, "driver": None, "home": None},
                **{"trial_id": "t00000", "origin": "suggested", "number": 0, "config": trial.model_dump()},
                "ending": {
                    **{"metric": "val_loss", "patience": None, "divergence_factor": 1e9, "early_loss_epochs": []},
                },
            }
        )
        while time.monotonic() - began < 60 * flags.minutes:
            before, known = time.monotonic(), len(writing)
            row = worker.step()
            epochs += 1
            if len(writing) > known:  # with the copy that is taken for it
                copying += time.monotonic() - before - row["seconds"]
    seconds = time.monotonic() - began
    sizes = ", ".join(f"{n_bytes / 1e6:.0f} MB in {took:.1f} s" for took, n_bytes in writing)
    print(f"{epochs} epochs in {seconds:.0f} s; {len(writing)} checkpoints ({sizes})")
    print(f"checkpoints took {copying:.1f} s: {copying / seconds:.1%} of the time")


if __name__ == "__main__":
    main()
