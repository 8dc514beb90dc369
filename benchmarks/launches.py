"""Count, on the CPU, the operations of a training step that are kernel launches on a GPU.

All stages are trained under bfloat16 autocast, with AdamW, light augmentation and the average of weights. Counted are
PyTorch's operations but for views and allocations, of an epoch of eight steps less one of four. What only CPUs do
(gradients of depthwise convolutions by sums) is left out.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tuning.settings.config import TrialConfig
from tuning.training import models
from tuning.training.dataset import Data
from tuning.training.finetune import finetune

BACKBONES = ("resnet18", "tf_efficientnet_lite0", "densenet121")
BATCH, SIDE, FEWER, MORE = 4, 32, 4, 8  # images of a step, pixels, steps
NO_LAUNCH = set(
    "view _unsafe_view _reshape_alias t transpose permute expand as_strided slice select unbind split split_with_sizes "
    "chunk unsqueeze squeeze alias detach lift_fresh empty empty_like empty_strided new_empty new_empty_strided".split()
)


class Launches(TorchDispatchMode):
    """Counts operations that do some work."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.partition("::")[2] not in NO_LAUNCH
        return func(*args, **(kwargs or {}))


def of_an_epoch(backbone: str, steps: int) -> int:
    """Operations of an epoch of so many steps."""
    train = steps * BATCH
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (train + BATCH, SIDE, SIDE, 1), dtype=np.uint8))
    labels, places = np.arange(train + BATCH) % 2, np.arange(train + BATCH)
    data = Data(images, labels, places[:train], places[train:], places[:0], ("a", "b"))
    given: dict[str, Any] = {"unfreeze_depth": 5, "augmentation": "light", "epochs": 2, "learning_rate": 1e-3}
    config = TrialConfig(backbone=backbone, image_size=SIDE, batch_size=BATCH, **given)
    epochs = finetune(config, data, device=torch.device("cpu"), weights=None, early_loss_epochs=(1, 2))
    with Launches() as launches:
        next(epochs)
    return launches.count


def main() -> None:
    """Print the launches of a step of each network."""
    models.mixed_precision = lambda device: torch.bfloat16
    models.speed_up = lambda model: None
    for backbone in BACKBONES:
        count = (of_an_epoch(backbone, MORE) - of_an_epoch(backbone, FEWER)) / (MORE - FEWER)
        print(f"{backbone}: {count:g} launches a step", flush=True)


if __name__ == "__main__":
    main()
