"""By which validation figure to choose epochs and trials, and whether to average the best, for the best final model.

Trains random configurations of the space `quick`, keeps the validation and test logits of every epoch, and replays the
choice: `DRAWS` times a dozen configurations are drawn, epoch and trial are chosen by each criterion on validation, a
temperature is fitted there, as `train_final.py` does, and the chosen model is scored on the test set.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
import tyro
from numpy.typing import NDArray

from benchmarks.sets import SETS, manifest
from tuning.checks.audit import load_checked
from tuning.data.images import open_images
from tuning.data.splits import resplit
from tuning.insight.ensemble import halves, selected
from tuning.record.predictions import group_numbers
from tuning.record.tables import replacing
from tuning.record.temperature import fit_temperature, logarithms, tempered, tempered_loss
from tuning.search.optimizer import Optimizer
from tuning.settings.config import SearchPlan, TrialConfig
from tuning.settings.space import trial_values
from tuning.settings.space_file import load
from tuning.settings.values import Weights
from tuning.training.backbones import evaluating
from tuning.training.dataset import Data, join, preparer
from tuning.training.device import keep_memory
from tuning.training.features import FeatureCache
from tuning.training.finetune import finetune
from tuning.training.models import Models
from tuning.training.scores import calibrated_loss, predict_images, score
from tuning.training.weights import find_weights

EPOCHS, IMAGE_SIZE, DRAWN, DRAWS, BEST, ROUNDS = 8, 64, 12, 500, 5, 50
Floats: TypeAlias = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compare criteria of selection on recorded predictions."""

    xrays: str | None = None
    """Folder of the chest X-rays; without it, sets made of them are left out."""
    sets: tuple[str, ...] = SETS
    """Image sets."""
    configs: int = 24
    """Number of random configurations of a set."""
    out: str = "results/selection"
    """Folder of what was recorded; what is there is not trained again."""


def sets_of(flags: Flags) -> list[str]:
    """Return the sets whose images are there."""
    return [name for name in flags.sets if flags.xrays is not None or not name.startswith("xrays")]


# ---- recording --------------------------------------------------------------------------------------------------


def configurations(count: int) -> list[TrialConfig]:
    """Random configurations, as the search's random sampler draws them."""
    space = load("quick")
    sampler = Optimizer(space, seed=0, metric="val_loss", sampler="random")
    fixed = {"epochs": EPOCHS, "seed": 0, "image_size": IMAGE_SIZE}
    return [TrialConfig(**trial_values(space, sampler.ask(number)) | fixed) for number in range(count)]


def record(
    task: tuple[int, int, TrialConfig], data: Callable[[int], Data], weights: dict[str, Weights | None], out: Path
) -> None:
    """Train a configuration on a split and keep what `Curves` holds of it, in `out`.

    Args:
        task: number of the configuration, seed of the split (0: the set's own) and the configuration.
        data: gives the images as a seed splits them.
        weights: file of each backbone.
        out: folder.
    """
    number, seed, config = task
    path = file_of(out, number, seed)
    if path.exists():
        return
    torch.set_num_threads(1)
    keep_memory()
    split = data(seed)
    models, device, file = Models(), torch.device("cpu"), weights[config.backbone]
    shape = {"classes": len(split.classes), "image_size": config.image_size}
    network = models.get(config.backbone, **shape, seed=config.seed, weights=file, device=device)
    prepare, cache = preparer(split.images, network.model, device), FeatureCache(out / "features", 10**10)
    both = np.concatenate([split.val, split.test])
    logits = []
    for row, _ in finetune(config, split, device=device, weights=file, features=cache, models=models):
        if row["val_loss"] is None:
            break
        with evaluating(network.model):
            logits.append(predict_images(network.model, prepare, both))
    val, test = np.split(np.array(logits).reshape(-1, len(both), len(split.classes)), [len(split.val)], axis=1)
    with replacing(path) as temporary, open(temporary, "wb") as written:
        np.savez(written, val=val, test=test, of_val=split.labels[split.val])


def file_of(out: Path, number: int, seed: int) -> Path:
    """Return the file of a configuration on a split."""
    return out / (f"{number:02d}-{seed}.npz" if seed else f"{number:02d}.npz")


def split_by(samples: pd.DataFrame, images: NDArray[np.uint8], seed: int) -> Data:
    """Return the images as a seed splits them into training and validation; 0: as they are."""
    return join(resplit(samples, seed) if seed else samples, images)


def record_all(name: str, flags: Flags, seeds: Callable[[int], list[int]]) -> tuple[pd.DataFrame, Path]:
    """Train a set's configurations on their splits where that isn't kept yet, a process per core.

    Args:
        name: of the set.
        flags: of the command.
        seeds: gives the seeds of a configuration's splits.

    Returns:
        the samples, and the folder of what is kept.
    """
    out = Path(flags.out).resolve() / name
    out.mkdir(parents=True, exist_ok=True)
    plan = SearchPlan(name="selection", data=str(manifest(name, out.parent / "images", flags.xrays)), on_leak="warn")
    samples, folders, *_ = load_checked(plan, [IMAGE_SIZE])
    wanted = configurations(flags.configs)
    weights = find_weights([config.backbone for config in wanted], "auto")
    tasks = [(number, seed, config) for number, config in enumerate(wanted) for seed in seeds(number)]
    data = partial(split_by, samples, open_images(folders[IMAGE_SIZE]))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.map(partial(record, data=data, weights=weights, out=out), tasks, chunksize=1)
    return samples, out


def recorded(name: str, flags: Flags) -> "Curves":
    """Return a set's predictions; those that aren't there yet are made."""
    samples, out = record_all(name, flags, lambda number: [0])
    data = join(samples, np.empty(len(samples), dtype=np.uint8))
    files = [np.load(file_of(out, number, 0)) for number in range(flags.configs)]
    kept = [(file["val"], file["test"]) for file in files if len(file["val"])]
    return Curves(kept, data.labels[data.val], data.labels[data.test], group_numbers(samples.iloc[data.val]))


# ---- selection --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curves:
    """Logits [epochs, images, classes] of each configuration that had a finite loss, for validation and test."""

    logits: list[tuple[NDArray[np.float32], NDArray[np.float32]]]
    val: NDArray[np.int64]  # classes of the validation images
    test: NDArray[np.int64]
    groups: NDArray[np.int64]  # of the validation images


def cross_entropy(logits: NDArray[Any], targets: NDArray[np.int64], temperature: float = 1.0) -> float:
    """Return the mean loss, in nats, at a temperature."""
    return float(-logarithms(tempered(logits, temperature))[np.arange(len(targets)), targets].mean())


def crosswise(logits: NDArray[Any], targets: NDArray[np.int64], groups: NDArray[np.int64]) -> float:
    """Return the loss of each half of the images at the temperature that fits the other half."""
    first = halves(targets, groups)
    fitted = {half: fit_temperature(logits[first != half], targets[first != half]) for half in (True, False)}
    losses = [cross_entropy(logits[first == half], targets[first == half], fitted[half]) for half in fitted]
    return float(np.average(losses, weights=[first.sum(), (~first).sum()]))


def auroc(logits: NDArray[Any], targets: NDArray[np.int64], _: Any) -> float:
    """Return the macro AUROC, negated."""
    return -float(score(logits, targets)["auroc"] or 0.0)


def mixed(logits: NDArray[Any], targets: NDArray[np.int64], groups: NDArray[np.int64]) -> float:
    """Return the tempered loss less an AUROC of the same weight."""
    return tempered_loss(logits, targets) + auroc(logits, targets, groups)


CRITERIA: dict[str, Callable[..., float]] = {
    "loss": lambda logits, targets, groups: cross_entropy(logits, targets),
    "tempered loss": lambda logits, targets, groups: tempered_loss(logits, targets),
    "tempered loss, crosswise": crosswise,
    "calibrated loss": lambda logits, targets, groups: calibrated_loss(logits, targets),
    "AUROC": auroc,
    "tempered loss less AUROC": mixed,
}


def delivered(val: NDArray[Any], test: NDArray[Any], curves: Curves) -> dict[str, float]:
    """Return the test figures of a model at the temperature fitted on validation."""
    probabilities = tempered(test, fit_temperature(val, curves.val))
    found = score(logarithms(probabilities).astype(np.float32), curves.test)
    return {name: float(found[name] or np.nan) for name in ("loss", "auroc", "balanced_accuracy")}


def mean_of(models: list[NDArray[Any]], weights: Floats | None = None) -> Floats:
    """Return the logarithms of averaged probabilities."""
    return logarithms(np.average([tempered(logits, 1.0) for logits in models], axis=0, weights=weights))


def greedy(true: Floats) -> Floats:
    """Return shares [models] in the ensemble of lowest cross-entropy, by selection with replacement.

    Caruana et al. 2004 (https://doi.org/10.1145/1015330.1015432). `true` [models, images] are the probabilities of each
    image's true class.
    """
    total, times = np.zeros(true.shape[1]), np.zeros(len(true))
    least, best = np.inf, times
    for size in range(1, ROUNDS + 1):
        losses = -np.log((total + true) / size).mean(axis=1)
        chosen = int(losses.argmin())
        total += true[chosen]
        times[chosen] += 1
        if losses[chosen] < least - 1e-9:
            least, best = losses[chosen], times / size
    return best


def averages(chosen: list[tuple[NDArray[Any], NDArray[Any]]], curves: Curves) -> dict[str, dict[str, float]]:
    """Return the test figures of ensembles of models, the best first."""
    images = np.arange(len(curves.val))
    plain = [[val / 1.0, test / 1.0] for val, test in chosen]
    heated = []
    for val, test in chosen:
        temperature = fit_temperature(val, curves.val)
        heated.append([val / temperature, test / temperature])
    found = {}
    for how, models in (("", plain), (", each tempered first", heated)):
        vals, tests = [val for val, _ in models], [test for _, test in models]
        found[f"mean of the best {BEST}{how}"] = delivered(mean_of(vals), mean_of(tests), curves)
        true = np.stack([np.exp(logarithms(tempered(val, 1.0)))[images, curves.val] for val in vals])
        shares = greedy(np.maximum(true, np.finfo(np.float64).tiny))
        found[f"greedy of the best {BEST}{how}"] = delivered(mean_of(vals, shares), mean_of(tests, shares), curves)
    ranked, size = selected(np.stack([tempered(val, 1.0) for val, _ in plain]), curves.val)
    vals, tests = ([plain[index][part] for index in ranked[:size]] for part in (0, 1))
    found["mean of as many as validation says"] = delivered(mean_of(vals), mean_of(tests), curves)
    for size in (2, 3):
        vals, tests = ([model[part] for model in plain[:size]] for part in (0, 1))
        found[f"mean of the best {size}"] = delivered(mean_of(vals), mean_of(tests), curves)
    return found


def compare(curves: Curves) -> pd.DataFrame:
    """Return the mean test figures of each way to choose: a row per way and draw."""
    epochs: dict[str, list[int]] = {}  # chosen of each configuration
    values: dict[str, Floats] = {}
    for name, criterion in CRITERIA.items():
        of_each = [[criterion(each, curves.val, curves.groups) for each in val] for val, _ in curves.logits]
        epochs[name] = [int(np.argmin(each)) for each in of_each]
        values[name] = np.array([min(each) for each in of_each])
    single = {
        name: [delivered(val[at], test[at], curves) for (val, test), at in zip(curves.logits, chosen, strict=True)]
        for name, chosen in epochs.items()
    }
    rows, rng = [], np.random.default_rng(0)
    for draw in range(DRAWS):
        drawn = rng.permutation(len(curves.logits))[:DRAWN]
        for name in CRITERIA:
            best = drawn[np.argsort(values[name][drawn], kind="stable")]
            rows.append({"draw": draw, "criterion": name, "model": "the best", **single[name][best[0]]})
            if name in ("loss", "tempered loss"):
                chosen = [tuple(part[epochs[name][each]] for part in curves.logits[each]) for each in best[:BEST]]
                for model, figures in averages(chosen, curves).items():
                    rows.append({"draw": draw, "criterion": name, "model": model, **figures})
    return pd.DataFrame(rows)


def main() -> None:
    """Record what isn't there yet, and print a table for each set."""
    flags = tyro.cli(Flags)
    for name in sets_of(flags):
        curves = recorded(name, flags)
        rows = compare(curves)
        table = rows.groupby(["criterion", "model"], sort=False)[["loss", "auroc", "balanced_accuracy"]].mean()
        print(f"\n{name}: {len(curves.logits)} configurations, {len(curves.val)} validation images", flush=True)
        print(table.round(4).to_string(), flush=True)


if __name__ == "__main__":
    main()
