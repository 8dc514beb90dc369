"""Record learning curves of a grid of configurations, for `replay.py` to answer with.

The search itself trains the grid as start points, all epochs of each (`run_search.py --no-early-stopping`), so a
recording that was interrupted goes on where it was. Curves are written to `benchmarks/curves/NAME.parquet`. The X-rays
and the generated radiographs were recorded on a grid of three policies and trained batch norm (`FIRST_GRID`), the other
sets (`sets.RECORDED`) on one of two policies and both kinds of batch norm, at more depths.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
import yaml

from benchmarks.sets import RECORDED, manifest
from tuning.insight.analysis import class_entropy
from tuning.record.tables import read_table, replacing

ROOT = Path(__file__).resolve().parent.parent
CURVES = ROOT / "benchmarks" / "curves"
Grid = dict[str, tuple[Any, ...]]
FIRST_GRID: Grid = {
    "backbone": ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"),
    "augmentation": ("none", "light", "strong"),
    "unfreeze_depth": (5, 3, 1, 0),  # in the order of training: the longest first, and frozen outputs derived
    "learning_rate": tuple(3e-5 * 4**level for level in range(6)),
}
GRID: Grid = FIRST_GRID | {
    "augmentation": ("none", "light"),
    "unfreeze_depth": (5, 3, 2, 1, 0),
    "batch_norm": ("train", "frozen"),
}
FIXED = {"image_size": 64, "batch_size": 32, "optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 0.5}
EPOCHS = 9
COLUMNS = ["epoch", "train_loss", "train_eval_loss", "early_loss"]
COLUMNS += ["val_loss", "val_tempered_loss", "val_accuracy", "val_balanced_accuracy", "val_auroc"]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Record the curves of the grid on one data set."""

    name: str
    """Of the run and of the file of curves; one of `sets.RECORDED`, or another."""
    data: str | None = None
    """Of another: folder of class folders, or manifest. Default: the generated radiographs."""
    xrays: str | None = None
    """Folder of the chest X-rays."""
    out: str = "results"
    """Folder that the run's folder and the images are made in, or are found in."""
    concurrent: int | None = None
    """Trials at once. Default: as `run_search.py`."""


def configurations(grid: Grid) -> list[dict[str, Any]]:
    """All of the grid, in the order of training; where the classifier alone is trained, without batch norm."""
    every = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    alone = grid.get("batch_norm", ())[1:]
    named = [each for each in every if each["unfreeze_depth"] > 0 or each.get("batch_norm") not in alone]
    return [
        {name: value for name, value in each.items() if name != "batch_norm" or each["unfreeze_depth"] > 0}
        for each in named
    ]


def space(grid: Grid) -> dict[str, Any]:
    """A search space whose start points are the grid. A learning rate's cell is as wide as the step to the next."""
    rates = grid["learning_rate"]
    parameters: dict[str, dict[str, Any]] = {
        name: {"type": "categorical", "choices": list(choices)} for name, choices in grid.items()
    }
    parameters["learning_rate"] = {"type": "float", "low": rates[0] / 2, "high": rates[-1] * 2, "log": True}
    if "batch_norm" in grid:
        parameters["batch_norm"]["when"] = "unfreeze_depth > 0"
    return {"parameters": parameters, "fixed": FIXED, "start": configurations(grid)}


def curves(run: Path, grid: Grid) -> pd.DataFrame:
    """A row per configuration and epoch.

    Returns:
        The grid's parameters, `COLUMNS`, seconds (of the epoch: the median over the learning rates, which all cost the
        same) and images_train, images_val of the data set.
    """
    trials, epochs, samples = (read_table(run / f"{name}.parquet") for name in ("trials", "epochs", "samples"))
    columns = {f"config_{name}": name for name in grid}
    epochs = epochs.drop(columns="learning_rate")  # the last step's; the configuration's is meant
    rows = epochs.merge(trials[["trial_id", *columns]].rename(columns=columns), on="trial_id")
    same_cost = [name for name in grid if name != "learning_rate"]
    rows["seconds"] = rows.groupby(same_cost, dropna=False)["seconds"].transform("median")
    for split in ("train", "val"):
        rows[f"images_{split}"] = int((samples["split"] == split).sum())
    return rows.sort_values([*grid, "epoch"])[[*grid, *COLUMNS, "seconds", "images_train", "images_val"]]


def main() -> int:
    """Record what isn't there yet, and write the curves."""
    flags = tyro.cli(Flags)
    run, named = Path(flags.out) / flags.name, flags.name in RECORDED
    if named and flags.data is not None:
        raise SystemExit(f"--data: {flags.name} is one of {', '.join(RECORDED)}, which have their own images")
    grid = GRID if named else FIRST_GRID
    command = [sys.executable, str(ROOT / "tuning" / "run_search.py"), "--name", flags.name, "--storage", flags.out]
    if (run / "plan.yaml").exists():
        command += ["--resume"]
    else:
        Path(flags.out).mkdir(parents=True, exist_ok=True)
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(space(grid)))
        command += ["--space", str(path), "--trials", str(len(configurations(grid)))]
        command += ["--epochs", str(EPOCHS), "--no-early-stopping", "--set", "early_loss=always"]
        data = str(manifest(flags.name, Path(flags.out) / "images", flags.xrays)) if named else flags.data
        command += [] if data is None else ["--data", data]
    command += [] if flags.concurrent is None else ["--concurrent", str(flags.concurrent)]
    code = subprocess.run(command).returncode
    if code:
        return code
    CURVES.mkdir(exist_ok=True)
    table = pa.Table.from_pandas(curves(run, grid), preserve_index=False)
    samples = read_table(run / "samples.parquet")
    entropy = class_entropy(samples)
    how = json.dumps({"grid": grid, "fixed": FIXED, "epochs": EPOCHS, "seed": 0, "class_entropy": entropy})
    with replacing(CURVES / f"{flags.name}.parquet") as temporary:
        pq.write_table(table.replace_schema_metadata({"recorded": how}), temporary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
