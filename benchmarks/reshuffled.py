"""Whether to choose by other validation images for each trial, or by several splits, instead of one split for all.

- reshuffled: each trial has a random split into training and validation of its own (Nagler et al. 2024,
  https://arxiv.org/abs/2405.15393).
- several splits: each trial is trained on `SPLITS` random splits and judged by the mean, so that a third of the
  trials can be afforded; or the rungs of successive halving see all splits.

Uses the configurations of `selection.py` and what it has recorded of them on one split, and its way to draw, choose by
the tempered loss and score. Means of models are of models that were each tempered on their own validation images.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import tyro
from numpy.typing import NDArray

from benchmarks.selection import DRAWN, DRAWS, EPOCHS, Flags, file_of, mean_of, record_all, sets_of
from tuning.record.temperature import fit_temperature, tempered_loss
from tuning.training.scores import score

SPLITS = 3  # random splits of each configuration, and as many times fewer configurations
RUNGS, KEPT = (1, 3, EPOCHS), 3  # epochs after which a third goes on


@dataclass(frozen=True)
class Trial:
    """A configuration on one split."""

    losses: list[float]  # tempered, on its validation images, of each epoch
    tests: list[NDArray[Any]]  # test logits [images, classes] of each epoch, divided by the temperature

    def best(self, epochs: int = EPOCHS) -> int:
        return int(np.argmin(self.losses[:epochs]))

    def least(self, epochs: int = EPOCHS) -> float:
        return min(self.losses[:epochs], default=np.inf)


def seeds_of(number: int) -> list[int]:
    """Return the split seeds of a configuration: 0 is the set's split, others are its own."""
    return [0, *(100 * number + split for split in range(1, SPLITS + 1))]


def trials(name: str, flags: Flags) -> tuple[list[list[Trial]], NDArray[np.int64]]:
    """Return each configuration's trials on its splits, and the test images' classes."""
    samples, out = record_all(name, flags, seeds_of)
    classes = sorted(samples["label"].unique())
    of_test = np.array([classes.index(label) for label in samples.loc[samples["split"] == "test", "label"]])
    found = []
    for number in range(flags.configs):
        each = []
        for seed in seeds_of(number):
            file = np.load(file_of(out, number, seed))
            of_val = file["of_val"]
            losses = [tempered_loss(val, of_val) for val in file["val"]]
            tests = [test / fit_temperature(val, of_val) for val, test in zip(file["val"], file["test"], strict=True)]
            each.append(Trial(losses, tests))
        found.append(each)
    return found, of_test


def mean_loss(splits: list[Trial], epochs: int = EPOCHS) -> float:
    """Return the mean over splits of the least loss within some epochs."""
    return float(np.mean([trial.least(epochs) for trial in splits]))


def halved(numbers: list[int], splits: dict[int, list[Trial]]) -> int:
    """Return the configuration that successive halving by the mean over splits ends with."""
    for epochs in RUNGS:
        ranked = sorted(numbers, key=lambda number: mean_loss(splits[number], epochs))
        numbers = ranked[: max(1, len(ranked) // KEPT)]
    return numbers[0]


def compare(configs: list[list[Trial]], of_test: NDArray[np.int64]) -> pd.DataFrame:
    """Return the mean test figures of each way to choose."""
    rows, rng = [], np.random.default_rng(0)
    usable = [number for number, each in enumerate(configs) if all(trial.losses for trial in each)]
    own = {number: configs[number][1:] for number in usable}  # splits of its own
    one = {number: configs[number][:1] for number in usable}  # the split of all
    first = {number: each[:1] for number, each in own.items()}

    def add(way: str, epochs: int, *models: NDArray[Any]) -> None:
        logits = (models[0] if len(models) == 1 else mean_of(list(models))).astype(np.float32)
        found = score(logits, of_test)
        rows.append({"way": way, "epochs": epochs} | {name: found[name] for name in ("loss", "auroc")})

    for _ in range(DRAWS):
        drawn = [int(each) for each in rng.permutation(usable)[:DRAWN]]
        few = drawn[: DRAWN // SPLITS]
        for way, splits in (("one split", one), ("reshuffled", first)):
            ranked = sorted(drawn, key=lambda number: mean_loss(splits[number]))
            models = [splits[number][0].tests[splits[number][0].best()] for number in ranked[:5]]
            add(f"{way}: the best", DRAWN * EPOCHS, models[0])
            add(f"{way}: mean of the best 5", DRAWN * EPOCHS, *models)
        for chosen, count in ((few, few), (drawn, drawn)):
            best = min(chosen, key=lambda number: mean_loss(own[number]))
            models = [trial.tests[trial.best()] for trial in own[best]]
            cost = len(count) * SPLITS * EPOCHS
            add(f"{SPLITS} splits of {len(count)} trials: the first split's model", cost, models[0])
            add(f"{SPLITS} splits of {len(count)} trials: mean of its models", cost, *models)
        many = [int(each) for each in rng.permutation(usable)[: 6 * KEPT]]
        for way, numbers, splits in (
            ("halving 18 by one split", many, one),
            ("halving 18, reshuffled", many, first),
            (f"halving 6 by {SPLITS} splits", many[:6], own),
        ):
            trial = splits[halved(numbers, splits)][0]
            add(f"{way}: the first split's model", 40, trial.tests[trial.best()])
    return pd.DataFrame(rows)


def main() -> None:
    """Record what isn't there yet, and print a table for each set."""
    flags = tyro.cli(Flags)
    for name in sets_of(flags):
        table = compare(*trials(name, flags)).groupby("way", sort=False).mean()
        print(f"\n{name}\n{table.round(4).to_string()}", flush=True)


if __name__ == "__main__":
    main()
