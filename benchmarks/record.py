"""Record learning curves of a grid of configurations, for `replay.py` to answer with.

The search itself trains the grid as start points, all epochs of each (`run_search.py --no-early-stopping`), so a
recording that was interrupted goes on where it was. Curves are written to `benchmarks/curves/NAME.parquet`.
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

from tuning.insight.analysis import class_entropy
from tuning.record.tables import read_table, replacing

ROOT = Path(__file__).resolve().parent.parent
CURVES = ROOT / "benchmarks" / "curves"
GRID: dict[str, tuple[Any, ...]] = {
    "backbone": ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"),
    "augmentation": ("none", "light", "strong"),
    "unfreeze_depth": (5, 3, 1, 0),  # in the order of training: the longest first, and frozen outputs derived
    "learning_rate": tuple(3e-5 * 4**level for level in range(6)),
}
FIXED = {"image_size": 64, "batch_size": 32, "optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 0.5}
EPOCHS = 9
COLUMNS = ["epoch", "train_loss", "train_eval_loss", "early_loss"]
COLUMNS += ["val_loss", "val_accuracy", "val_balanced_accuracy", "val_auroc"]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Record the curves of the grid on one data set."""

    name: str
    """Of the run and of the file of curves."""
    data: str | None = None
    """Folder of class folders, or manifest. Default: the generated radiographs."""
    out: str = "results"
    """Folder that the run's folder is made in, or is found in."""


def grid() -> list[dict[str, Any]]:
    """The 216 configurations."""
    return [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]


def space() -> dict[str, Any]:
    """A search space whose start points are the grid. A learning rate's cell is as wide as the step to the next."""
    rates = GRID["learning_rate"]
    parameters = {name: {"type": "categorical", "choices": list(choices)} for name, choices in GRID.items()}
    parameters["learning_rate"] = {"type": "float", "low": rates[0] / 2, "high": rates[-1] * 2, "log": True}
    return {"parameters": parameters, "fixed": FIXED, "start": grid()}


def curves(run: Path) -> pd.DataFrame:
    """A row per configuration and epoch.

    Returns:
        The grid's parameters, `COLUMNS`, seconds (of the epoch: the median over the learning rates, which all cost the
        same) and images_train, images_val of the data set.
    """
    trials, epochs, samples = (read_table(run / f"{name}.parquet") for name in ("trials", "epochs", "samples"))
    columns = {f"config_{name}": name for name in GRID}
    epochs = epochs.drop(columns="learning_rate")  # the last step's; the configuration's is meant
    rows = epochs.merge(trials[["trial_id", *columns]].rename(columns=columns), on="trial_id")
    same_cost = ["backbone", "augmentation", "unfreeze_depth"]
    rows["seconds"] = rows.groupby(same_cost)["seconds"].transform("median")
    for split in ("train", "val"):
        rows[f"images_{split}"] = int((samples["split"] == split).sum())
    return rows.sort_values([*GRID, "epoch"])[[*GRID, *COLUMNS, "seconds", "images_train", "images_val"]]


def main() -> int:
    """Record what isn't there yet, and write the curves."""
    flags = tyro.cli(Flags)
    run = Path(flags.out) / flags.name
    command = [sys.executable, str(ROOT / "tuning" / "run_search.py"), "--name", flags.name, "--storage", flags.out]
    if (run / "plan.yaml").exists():
        command += ["--resume"]
    else:
        Path(flags.out).mkdir(parents=True, exist_ok=True)
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(space()))
        command += ["--space", str(path), "--trials", str(len(grid())), "--epochs", str(EPOCHS), "--no-early-stopping"]
        command += ["--set", "early_loss=always"]
        command += [] if flags.data is None else ["--data", flags.data]
    code = subprocess.run(command).returncode
    if code:
        return code
    CURVES.mkdir(exist_ok=True)
    table = pa.Table.from_pandas(curves(run), preserve_index=False)
    samples = read_table(run / "samples.parquet")
    entropy = class_entropy(samples)
    how = json.dumps({"grid": GRID, "fixed": FIXED, "epochs": EPOCHS, "seed": 0, "class_entropy": entropy})
    with replacing(CURVES / f"{flags.name}.parquet") as temporary:
        pq.write_table(table.replace_schema_metadata({"recorded": how}), temporary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
