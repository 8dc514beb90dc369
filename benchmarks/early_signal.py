"""What of a trial's first epochs tells best how it will end.

Trains partly and wholly unfrozen networks at several learning rates and prints, for each signal, its rank correlation
(Spearman's rho) with the best validation loss that the same configuration reaches in all its epochs:

- last, best, mean: the validation loss of an epoch, the best so far, the mean of the last two;
- line, power: extrapolated to the last epoch by the last step, and by a power law through the losses so far;
- training loss, alone and as a sum of ranks with others;
- averaged: the validation loss of exponentially averaged weights (and batch-norm statistics), over about an epoch;
- in epoch 1 also after a quarter and half of the steps, plain and averaged;
- short: a cosine schedule that ends there, against the best of the long one.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.record import EPOCHS, FIRST_GRID, FIXED
from tuning.checks.audit import load_checked
from tuning.data.images import open_images
from tuning.record.tables import replacing
from tuning.settings.config import SearchPlan, TrialConfig
from tuning.settings.values import Weights
from tuning.training.backbones import evaluating
from tuning.training.dataset import Data, join, preparer
from tuning.training.device import keep_memory
from tuning.training.features import FeatureCache
from tuning.training.finetune import finetune
from tuning.training.models import Models
from tuning.training.scores import calibrated_loss, predict_images, score
from tuning.training.state import Averaged
from tuning.training.weights import find_weights

SHORT = (2, 3)  # epochs of the short schedules
INSIDE = (0.25, 0.5)  # of the first epoch's steps
Task = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure which early signal ranks configurations best."""

    data: str | None = None
    """Folder of class folders, or manifest. Default: the generated radiographs."""
    backbones: tuple[str, ...] = ("tf_efficientnet_lite1",)
    """Of the grid."""
    out: str = "results/early-signal"
    """Folder of what was measured; what is there is not measured again."""


def tasks(backbones: tuple[str, ...]) -> list[Task]:
    """Configurations, each with the long schedule and the short ones."""
    chosen = []
    for backbone, depth, policy, rate in itertools.product(
        backbones, (5, 3, 1), ("light", "none"), FIRST_GRID["learning_rate"]
    ):
        base = {"backbone": backbone, "unfreeze_depth": depth, "augmentation": policy, "learning_rate": rate}
        for epochs, schedule in [(EPOCHS, "cosine"), *((epochs, "cosine") for epochs in SHORT)]:
            chosen.append(tuple((base | {"epochs": epochs, "schedule": schedule}).items()))
    return chosen


def measure(task: Task, data: Data, weights: dict[str, Weights | None], out: Path) -> list[dict[str, Any]]:
    """Losses at each epoch, and within the first; kept in `out`."""
    path = out / ("-".join(f"{value:.2g}" if isinstance(value, float) else str(value) for _, value in task) + ".json")
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    torch.set_num_threads(1)
    keep_memory()
    config = TrialConfig(**FIXED | dict(task))
    models, device = Models(), torch.device("cpu")
    cache = FeatureCache(out / "features", 10**10)
    network = models.get(
        config.backbone,
        classes=len(data.classes),
        image_size=config.image_size,
        seed=config.seed,
        weights=weights[config.backbone],
        device=device,
    )
    model, prepare = network.model, preparer(data.images, network.model, device)
    steps = len(data.train) // config.batch_size
    averaged = Averaged(model, model.state_dict(), steps)
    taken = itertools.count(1)
    inside: dict[str, float | None] = {}

    def scores(kind: str) -> dict[str, float | None]:
        """Of the weights as they are."""
        targets = data.labels[data.val]
        with evaluating(model):
            logits = predict_images(model, prepare, data.val)
        found = score(logits, targets)
        calibrated = None if found["loss"] is None else calibrated_loss(logits, targets)
        return {f"{kind}": found["loss"], f"{kind} auroc": found["auroc"], f"{kind} calibrated": calibrated}

    def after_step(*_: Any) -> None:
        averaged.update()
        step = next(taken)
        for share in INSIDE:
            if step == round(share * steps):
                inside.update({f"{name} {share:g}": value for name, value in scores("last").items()})
                with averaged.in_place():
                    inside.update({f"{name} {share:g}": value for name, value in scores("averaged").items()})

    rows = []
    hook = register_optimizer_step_post_hook(after_step)
    try:
        for row, _ in finetune(
            config, data, device=device, weights=weights[config.backbone], features=cache, models=models
        ):
            found = scores("last")
            with averaged.in_place():
                found |= scores("averaged")
            rows.append(dict(task) | {name: row[name] for name in NAMED} | found | inside)
    finally:
        hook.remove()
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(rows))
    return rows


NAMED = ("epoch", "train_loss", "train_eval_loss", "val_loss", "seconds")


# ---- report -----------------------------------------------------------------------------------------------------


def line(losses: np.ndarray) -> float:
    step = losses[-1] - losses[-2] if len(losses) > 1 else 0.0
    return float(losses[-1] + step)


def power(losses: np.ndarray, epochs: int) -> float:
    """log loss linear in log epoch."""
    if len(losses) < 2:
        return float(losses[-1])
    slope, start = np.polyfit(np.log(np.arange(1, len(losses) + 1)), np.log(losses), 1)
    return float(np.exp(start + slope * math.log(epochs)))


KEYS = ["backbone", "unfreeze_depth", "augmentation", "learning_rate"]


def signals(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Each signal by configuration, less being better, from the epochs so far."""
    groups, last = rows.groupby(KEYS), rows[rows["epoch"] == rows["epoch"].max()].set_index(KEYS)
    found = {
        "loss": last["val_loss"],
        "loss, best": groups["val_loss"].min(),
        "loss, mean of two": rows[rows["epoch"] > rows["epoch"].max() - 2].groupby(KEYS)["val_loss"].mean(),
        "loss, line": groups["val_loss"].apply(lambda losses: line(losses.to_numpy())),
        "loss, power law": groups["val_loss"].apply(lambda losses: power(losses.to_numpy(), EPOCHS)),
        "training loss": last["train_loss"],
        "train_eval_loss": last["train_eval_loss"],
        "AUROC": -last["last auroc"],
        "AUROC, best": -groups["last auroc"].max(),
        "calibrated": last["last calibrated"],
        "calibrated, best": groups["last calibrated"].min(),
        "averaged": last["averaged"],
        "averaged, best": groups["averaged"].min(),
        "averaged AUROC": -last["averaged auroc"],
        "averaged, calibrated": last["averaged calibrated"],
        "averaged, calibrated, best": groups["averaged calibrated"].min(),
    }
    for name in ("AUROC, best", "calibrated", "calibrated, best", "averaged, calibrated, best"):
        found[f"{name} + training loss"] = found[name].rank() + found["training loss"].rank()
    return found


def report(rows: pd.DataFrame) -> None:
    """Print the rank correlation of each signal, at each epoch, with the best loss of the long schedule."""
    whole = rows[rows["epochs"] == EPOCHS]
    final = whole.groupby(KEYS)["val_loss"].min().fillna(math.inf)
    lines = []

    def add(signal: str, when: float, values: pd.Series) -> None:
        both = pd.DataFrame({"value": values, "final": final}).fillna(math.inf)
        lines.append({"signal": signal, "epoch": when, "rho": both["value"].rank().corr(both["final"].rank())})

    for epoch in (1, 2, 3, 4, 5, 6):
        for signal, values in signals(whole[whole["epoch"] <= epoch]).items():
            add(signal, epoch, values)
    first = whole[whole["epoch"] == 1].set_index(KEYS)
    for share in INSIDE:
        add("loss", share, first[f"last {share:g}"])
        add("AUROC", share, -first[f"last auroc {share:g}"])
        add("calibrated", share, first[f"last calibrated {share:g}"])
        add("averaged", share, first[f"averaged {share:g}"])
        add("averaged, calibrated", share, first[f"averaged calibrated {share:g}"])
    for epochs in SHORT:
        short = rows[(rows["epochs"] == epochs)]
        add("short schedule", epochs, short.groupby(KEYS)["val_loss"].min())
        add("short schedule, calibrated", epochs, short.groupby(KEYS)["last calibrated"].min())
    table = pd.DataFrame(lines)
    print(table.pivot(index="signal", columns="epoch", values="rho").round(2).to_string(na_rep=""))
    averaged = whole.groupby(KEYS)["averaged"].min()
    better = f"{(averaged < final).mean():.0%} of {len(final)} configurations"
    print(f"averaging made {better} better, by {(final - averaged).median():.4f} at the median;")
    print(f"the best of all {final.min():.4f} without and {averaged.min():.4f} with it")


def main() -> None:
    """Measure what isn't there yet, and print the table."""
    flags = tyro.cli(Flags)
    out = Path(flags.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    table, folders, *_ = load_checked(SearchPlan(name="early", data=flags.data), [FIXED["image_size"]])
    data = join(table, open_images(folders[FIXED["image_size"]]))
    weights = find_weights(list(flags.backbones), "auto")
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        found = pool.map(partial(measure, data=data, weights=weights, out=out), tasks(flags.backbones), chunksize=1)
    rows = pd.DataFrame(list(itertools.chain.from_iterable(found)))
    report(rows)


if __name__ == "__main__":
    main()
