"""Stock Ray Tune for `delivered.py`: its documentation's recipe of `OptunaSearch`, `ASHAScheduler` and checkpoints.

Called with a task: JSON with `data`, `seed`, `seconds` (null, or those of a random search without ASHA) and `place`,
where it leaves the logits of its models and the seconds until they existed.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch
from torch.utils.data import DataLoader

from benchmarks.recipe import Images, mean_loss, train_epoch, transforms
from tuning.data.samples import load_samples
from tuning.settings.config import TrialConfig
from tuning.settings.values import Weights
from tuning.training import backbones
from tuning.training.weights import find_weights

TRIALS, EPOCHS, SLOTS, IMAGE_SIZE, BATCH = 16, 8, 2, 64, 32
BACKBONES = [f"tf_efficientnet_lite{number}" for number in range(3)]
SPACE = {  # the space `quick`
    "backbone": tune.choice(BACKBONES),
    "unfreeze_depth": tune.randint(0, 6),
    "learning_rate": tune.loguniform(1e-5, 1e-1),
    "stage_lr_decay": tune.uniform(0.3, 1.0),
    "weight_decay": tune.loguniform(1e-4, 1e-1),
    "augmentation": tune.choice(["none", "light", "medium"]),
    "head_dropout": tune.uniform(0.0, 0.5),
    "batch_norm": tune.choice(["train", "frozen"]),
}


def build(config: dict[str, Any], seed: int, classes: int, weights: dict[str, Weights | None]) -> Any:
    """Return the configuration, the model and its optimizer."""
    trial = TrialConfig(**config, image_size=IMAGE_SIZE, batch_size=BATCH, warmup_epochs=0.5, epochs=EPOCHS, seed=seed)
    options = {"classes": classes, "image_size": IMAGE_SIZE, "head_dropout": trial.head_dropout, "seed": seed}
    model = backbones.build(trial.backbone, weights=weights[trial.backbone], **options)
    stages = backbones.stages(model, IMAGE_SIZE)
    backbones.unfreeze(model, stages, trial.unfreeze_depth, batch_norm=trial.batch_norm)
    model.to(memory_format=torch.contiguous_format)
    rates = {name: getattr(trial, name) for name in ("learning_rate", "stage_lr_decay", "weight_decay")}
    optimizer = torch.optim.AdamW(backbones.parameter_groups(model, stages, trial.unfreeze_depth, **rates))
    return trial, model, optimizer


def train(config: dict[str, Any], table: pd.DataFrame, weights: dict[str, Weights | None], seed: int) -> None:
    """Train one configuration, and report each epoch with a checkpoint."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    classes = sorted(table["label"].unique())
    trial, model, optimizer = build(config, seed, len(classes), weights)
    train_set, val_set = (table[table["split"] == name] for name in ("train", "val"))
    augmented = Images(train_set, classes, transforms(trial.augmentation, IMAGE_SIZE, trial.backbone))
    plain = transforms("none", IMAGE_SIZE, trial.backbone)
    loader = DataLoader(augmented, min(BATCH, len(train_set)), shuffle=True, drop_last=True, num_workers=0)
    val_loader = DataLoader(Images(val_set, classes, plain), 64, num_workers=0)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    for epoch in range(1, EPOCHS + 1):
        train_epoch(model, optimizer, peak_rates, loader, trial, epoch)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(model.state_dict(), f"{folder}/model.pt")
            checkpoint = tune.Checkpoint.from_directory(folder)
            tune.report({"epoch": epoch, "val_loss": mean_loss(model, val_loader)}, checkpoint=checkpoint)


@torch.no_grad()
def logits(model: Any, table: pd.DataFrame, split: str, trial: TrialConfig) -> Any:
    """Return logits and classes of a split."""
    classes = sorted(table["label"].unique())
    images = Images(table[table["split"] == split], classes, transforms("none", IMAGE_SIZE, trial.backbone))
    model.eval()
    found = [model(batch) for batch, _ in DataLoader(images, 64)]
    return torch.cat(found).numpy(), np.array(images.labels, dtype=np.int64)


def main() -> None:
    """Search, and leave the models' logits."""
    task = json.loads(sys.argv[1])
    place, seed, table = Path(task["place"]), task["seed"], load_samples(task["data"])
    weights = find_weights(BACKBONES, "auto")
    began = time.perf_counter()
    ray.init("local", num_cpus=SLOTS, include_dashboard=False, log_to_driver=False)
    plan: dict[str, Any] = {"metric": "val_loss", "mode": "min", "max_concurrent_trials": SLOTS}
    if task["seconds"] is None:
        plan |= {"search_alg": OptunaSearch(seed=seed), "scheduler": ASHAScheduler(max_t=EPOCHS), "num_samples": TRIALS}
    else:
        searcher = BasicVariantGenerator(random_state=seed, max_concurrent=SLOTS)
        plan |= {"search_alg": searcher, "num_samples": -1, "time_budget_s": task["seconds"]}
        del plan["max_concurrent_trials"]
    trainable = tune.with_parameters(train, table=table, weights=weights, seed=seed)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space=SPACE,
        tune_config=tune.TuneConfig(**plan),
        run_config=tune.RunConfig(name="ray", storage_path=str(place), verbose=0),
    )
    found = tuner.fit()
    (place / "seconds.json").write_text(json.dumps(time.perf_counter() - began))
    for name, scope in (("", "last"), (", best epoch", "all")):
        best = found.get_best_result("val_loss", "min", scope=scope)
        checkpoint = best.checkpoint if scope == "last" else best.get_best_checkpoint("val_loss", "min")
        trial, model, _ = build(best.config, seed, table["label"].nunique(), weights)
        with checkpoint.as_directory() as folder:
            model.load_state_dict(torch.load(f"{folder}/model.pt", weights_only=True))
        val, of_val = logits(model, table, "val", trial)
        test, of_test = logits(model, table, "test", trial)
        np.savez(place / f"model{name}.npz", val=val, test=test, of_val=of_val, of_test=of_test)


if __name__ == "__main__":
    main()
