"""How many planted wrong labels `tuning/label_issues.py` ranks among its first.

A share of the training and validation images gets another class, a search runs on them, and its best configuration is
cross-validated. Where cleanlab is installed, its ranking of the same probabilities stands
beside ours.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from tuning.data.phantoms import write_phantoms
from tuning.data.samples import load_samples
from tuning.record.tables import read_table

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Flags:
    """Plant wrong labels, search, rank."""

    data: str | None = None
    """Manifest, or folder of class folders. Default: the generated radiographs."""
    classes: tuple[str, ...] = ()
    """Classes that are taken. Default: all."""
    share: float = 0.02
    """Share of the training and validation images that get another class."""
    first: float = 0.05
    """Share of the images that is looked at."""
    trials: int = 10
    """Trials of the search."""
    epochs: int = 6
    """Epochs of each."""
    image_size: int = 96
    """Side in pixels."""
    seed: int = 0
    """Of what is planted."""
    out: str | None = None
    """Folder for the run. Default: a new temporary folder."""


def planted(flags: Flags, folder: Path) -> pd.DataFrame:
    """Write a manifest with wrong labels; return its rows, with whether each is wrong."""
    data = flags.data or str(write_phantoms(folder / "generated"))
    samples = load_samples(data)
    samples = samples[samples["label"].isin(flags.classes or set(samples["label"]))].reset_index(drop=True)
    rng, names = np.random.default_rng(flags.seed), sorted(set(samples["label"]))
    inside = np.flatnonzero(samples["split"] != "test")
    wrong = rng.choice(inside, round(flags.share * len(inside)), replace=False)
    labels = samples["label"].to_list()
    for row in wrong:
        labels[row] = str(rng.choice([name for name in names if name != labels[row]]))
    samples = samples.assign(label=labels, path=samples["file"], wrong=np.isin(np.arange(len(samples)), wrong))
    columns = ["path", "label", "split"] + ["group"] * bool(samples["group"].notna().all())
    samples[columns].to_csv(folder / "planted.csv", index=False)
    return samples


def main(flags: Flags) -> None:
    folder = Path(flags.out or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    samples = planted(flags, folder)
    settings = ["--set", f"image_size={flags.image_size}", "on_leak=warn"]
    sizes = ["--trials", str(flags.trials), "--epochs", str(flags.epochs)]
    for command in (
        ["run_search.py", "--data", "planted.csv", "--name", "planted", *sizes, *settings],
        ["label_issues.py", "results/planted"],
    ):
        whole = [sys.executable, str(ROOT / "tuning" / command[0]), *command[1:]]
        with open(folder / "log.txt", "a") as log:
            print(shlex.join(whole), file=log, flush=True)
            subprocess.run(whole, cwd=folder, stdout=log, check=True, env=os.environ)
    ranked = read_table(folder / "results" / "planted" / "label_issues.parquet")
    of_run = read_table(folder / "results" / "planted" / "samples.parquet").set_index("path")["file"]
    wrong = samples.set_index("file")["wrong"].reindex(of_run.reindex(ranked["path"])).to_numpy(bool)
    number = round(flags.first * len(ranked))
    print(f"{len(ranked)} images, {wrong.sum()} with a planted label; {ranked['issue'].sum()} are issues")
    print(f"among the first {number}: {wrong[:number].sum()}; among the issues: {wrong[ranked['issue']].sum()}")
    if find_spec("cleanlab") and ranked["label"].nunique() == 2:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores

        names = sorted(set(ranked["label"]))
        labels = np.array([names.index(label) for label in ranked["label"]])
        own = ranked["own_probability"].to_numpy()
        second = np.where(labels == 1, own, 1 - own)
        probabilities = np.stack([1 - second, second], axis=1)
        order = np.argsort(get_label_quality_scores(labels, probabilities), kind="stable")
        issues = find_label_issues(labels, probabilities)
        print(
            f"cleanlab: among the first {number}: {wrong[order[:number]].sum()}; among its {issues.sum()} issues: "
            f"{wrong[issues].sum()}"
        )


if __name__ == "__main__":
    main(tyro.cli(Flags))
