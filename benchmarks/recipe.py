"""The plain recipe that `speed.py` compares with: Ray Tune and torchvision as their documentation shows them.

Every epoch opens, resizes and augments each image and runs the whole network. What decides how well a configuration
does is the product's: samples and splits, stages, learning rates and their schedule, the new head.

`speed.py` calls it with a task: JSON with `data`, `slots` and `trials`, a list of trial configurations, and `gpu.py`
with `weights` too, `random`. Where there is a GPU, each trial has one.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
import timm
import torch
from PIL import Image
from ray import tune
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from tuning.data.samples import load_samples
from tuning.settings.config import TrialConfig
from tuning.settings.values import Weights
from tuning.training import backbones
from tuning.training.finetune import learning_rate_factor
from tuning.training.weights import find_weights


class Images(Dataset):
    """Image files and their labels."""

    def __init__(self, table: pd.DataFrame, classes: list[str], transform: v2.Compose):
        self.files, self.labels = list(table["file"]), [classes.index(label) for label in table["label"]]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def transforms(policy: str, image_size: int, backbone: str) -> v2.Compose:
    """torchvision's transforms, about as strong as the product's policy of this name."""
    bilinear = v2.InterpolationMode.BILINEAR
    flip, blur = v2.RandomHorizontalFlip(), v2.RandomApply([v2.GaussianBlur(5)])
    on_pil: list[nn.Module] = []
    if policy == "light":
        move = v2.RandomAffine(5, translate=(0.04, 0.04), scale=(0.95, 1.05), interpolation=bilinear)
        on_pil = [move, v2.ColorJitter(brightness=0.1, contrast=0.1)]
    if policy == "medium":
        move = v2.RandomAffine(10, translate=(0.08, 0.08), scale=(0.88, 1.12), interpolation=bilinear)
        on_pil = [flip, move, v2.ColorJitter(brightness=0.2, contrast=0.2)]
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    cfg = timm.get_pretrained_cfg(backbone)
    normalize = v2.Normalize(cfg.mean, cfg.std)
    on_tensor = [blur, normalize, v2.RandomErasing(0.25)] if policy == "medium" else [normalize]
    return v2.Compose([v2.Resize((image_size, image_size)), *on_pil, *to_tensor, *on_tensor])


def train(config: dict[str, Any], table: pd.DataFrame, weights: dict[str, Weights | None]) -> None:
    """Train one configuration and report each epoch: a function trainable."""
    torch.set_num_threads(1)
    trial = TrialConfig(**config["trial"])
    torch.manual_seed(trial.seed)

    # Data: the loss on a part of training as large as validation tells overfitting, as in the product.
    classes = sorted(table["label"].unique())
    train, val = table[table["split"] == "train"], table[table["split"] == "val"]
    train_eval = train.iloc[np.random.default_rng(0).permutation(len(train))[: len(val)]]
    augmented = Images(train, classes, transforms(trial.augmentation, trial.image_size, trial.backbone))
    plain = transforms("none", trial.image_size, trial.backbone)
    worker = {"num_workers": 1, "persistent_workers": True}
    loader = DataLoader(augmented, min(trial.batch_size, len(train)), shuffle=True, drop_last=True, **worker)
    val_loader = DataLoader(Images(val, classes, plain), 64, **worker)
    train_eval_loader = DataLoader(Images(train_eval, classes, plain), 64, **worker)

    # Model and optimizer.
    model = backbones.build(
        trial.backbone,
        classes=len(classes),
        image_size=trial.image_size,
        head_dropout=trial.head_dropout,
        seed=trial.seed,
        weights=weights[trial.backbone],
    )
    stages = backbones.stages(model, trial.image_size)
    backbones.unfreeze(model, stages, trial.unfreeze_depth, batch_norm=trial.batch_norm)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device, memory_format=torch.contiguous_format)
    rates = {name: getattr(trial, name) for name in ("learning_rate", "stage_lr_decay", "weight_decay")}
    optimizer = torch.optim.AdamW(backbones.parameter_groups(model, stages, trial.unfreeze_depth, **rates))
    peak_rates = [group["lr"] for group in optimizer.param_groups]

    for epoch in range(1, trial.epochs + 1):
        started = time.perf_counter()
        train_epoch(model, optimizer, peak_rates, loader, trial, epoch)
        losses = {"val_loss": mean_loss(model, val_loader), "train_eval_loss": mean_loss(model, train_eval_loader)}
        tune.report({"epoch": epoch, **losses, "seconds": time.perf_counter() - started, "clock": time.time()})


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    peak_rates: list[float],
    loader: DataLoader,
    trial: TrialConfig,
    epoch: int,
) -> None:
    """Train for an epoch, counted from 1, with the product's schedule of learning rates."""
    backbones.train_mode(model)
    for step, (images, targets) in enumerate(loader):
        factor = learning_rate_factor(trial, epoch - 1 + step / len(loader))
        for group, rate in zip(optimizer.param_groups, peak_rates, strict=True):
            group["lr"] = rate * factor
        device = next(model.parameters()).device
        loss = functional.cross_entropy(model(images.to(device)), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def mean_loss(model: nn.Module, loader: DataLoader) -> float:
    """Cross-entropy per image, in eval mode."""
    model.eval()
    device, total = next(model.parameters()).device, 0.0
    for images, targets in loader:
        total += functional.cross_entropy(model(images.to(device)), targets.to(device), reduction="sum").item()
    return total / len(loader.dataset)


def search(task: Path) -> None:
    """Train all configurations of a task; their epochs go into `rows.json` beside it."""
    given = json.loads(task.read_text())
    weights = find_weights([trial["backbone"] for trial in given["trials"]], given.get("weights", "auto"))
    resources = {"cpu": 1} | ({"gpu": 1} if torch.cuda.is_available() else {})
    ray.init("local", num_cpus=given["slots"], include_dashboard=False, log_to_driver=False)
    trainable = tune.with_parameters(train, table=load_samples(given["data"]), weights=weights)
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"trial": tune.grid_search(given["trials"])},
        tune_config=tune.TuneConfig(max_concurrent_trials=given["slots"]),
        run_config=tune.RunConfig(name="ray", storage_path=str(task.parent), verbose=0),
    )
    rows = []
    for result in tuner.fit():
        frame = result.metrics_dataframe
        columns = ["epoch", "val_loss", "train_eval_loss", "seconds", "clock"]
        epochs = [] if frame is None else json.loads(frame[columns].to_json(orient="records", double_precision=15))
        rows.append({"number": given["trials"].index(result.config["trial"]), "epochs": epochs})
    (task.parent / "rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    search(Path(sys.argv[1]))
