"""The final model before it meets the test set: one configuration trained again, or an ensemble of kept trials."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tuning.insight.calibration import logarithms, tempered
from tuning.insight.ensemble import named_shares, offer
from tuning.record import tables
from tuning.record.journal import best_epoch
from tuning.record.predictions import Predictions, read_predictions
from tuning.search.checkpoints import best_weights, kept
from tuning.settings.config import InputError, TrialConfig
from tuning.training import backbones
from tuning.training.dataset import Data, preparer
from tuning.training.features import FeatureCache
from tuning.training.finetune import Row, finetune, predict_images

CHECKED_IMAGES, CHECKED_DIFFERENCE = 16, 0.05  # of a member of an ensemble: its stored probabilities must come again


@dataclasses.dataclass(frozen=True)
class Final:
    """Networks whose probabilities are averaged, and what is known of them."""

    networks: dict[str, tuple[nn.Module, TrialConfig]]  # by trial; of a single one by the empty name
    shares: dict[str, float]  # of each in the average
    validated: NDArray[Any] | None  # logits of validation [images, classes]; null where it was trained on
    metrics: dict[str, Any]  # for metrics.json

    def logits(self, data: Mapping[int, Data], split: str, device: torch.device) -> NDArray[Any]:
        """Logits [images, classes] of a split, of several networks the logarithms of the average; `data` by size."""
        each = []
        for network, config in self.networks.values():
            some = data[config.image_size]
            prepare = preparer(some.images, config.backbone, device)
            each.append(predict_images(network.to(device), prepare, getattr(some, split)))
        if len(each) == 1:
            return each[0]
        probabilities = [
            share * tempered(logits, 1.0) for share, logits in zip(self.shares.values(), each, strict=True)
        ]
        return logarithms(np.sum(probabilities, axis=0))


def trained(
    config: TrialConfig,
    data: Data,
    *,
    last: int | None,
    weights: Path | None,
    device: torch.device,
    metric: str,
    features: FeatureCache,
    tell: Callable[[Row], None],
) -> Final:
    """A configuration, trained on train to its best epoch on validation, or on both for a number of epochs.

    In the latter case the learning rate goes as if all of `config.epochs` were to come, as it did when the number was
    found, and validation tells nothing any more.

    Args:
        config: what to train.
        data: decoded images.
        last: epochs to train on both; null: on train alone, for all epochs.
        weights: the backbone's weight file.
        device: where to train.
        metric: chooses the best epoch.
        features: keeps frozen layers' outputs.
        tell: called with each epoch's row.

    Raises:
        InputError: no epoch had a finite loss.
    """
    both = last is not None
    if both:
        data = dataclasses.replace(data, train=np.union1d(data.train, data.val))
    for row, snapshot in finetune(  # noqa: B007
        config, data, device=device, weights=weights, metric=metric, features=features
    ):
        tell(row)
        if row["epoch"] == last:
            break
    state = snapshot()
    best = state.history[-1] if both else best_epoch(state.history, metric)
    if best is None or best["val_loss"] is None:
        raise InputError("no epoch had a finite loss; choose a lower learning rate by --set learning_rate=...")
    part = "model/" if both else "best/"
    changed = {name.removeprefix(part): tensor for name, tensor in state.tensors.items() if name.startswith(part)}
    network = _built(config, len(data.classes), weights, changed)
    metrics = {
        "trained_on": "train+val" if both else "train",
        "epochs": best["epoch"],
        "validation": None if both else {name: best[name] for name in best if name.startswith("val_")},
        "train_eval_loss": best["train_eval_loss"],
    }
    validated = None if both else state.tensors["validation/logits"].numpy()
    return Final({"": (network, config)}, {"": 1.0}, validated, metrics)


def kept_trials(run: Path, samples: pd.DataFrame) -> tuple[Predictions, dict[str, TrialConfig]]:
    """Validation probabilities of the trials whose best weights are kept, and the configurations of these.

    Args:
        run: a run's folder.
        samples: the run's.

    Raises:
        InputError: there are none.
    """
    trials = tables.read_table(run / "trials.parquet")
    trials = trials[trials["origin"] != "probe"]
    configs = kept(run, trials)
    predictions = read_predictions(run, trials[trials["trial_id"].isin(list(configs))], samples)
    if not predictions.trial_ids:
        raise InputError(
            f"ensemble=true: no trial of {run} has both its best weights (in checkpoints/) and its probabilities (in "
            "predictions/); leave it out to train the best configuration again"
        )
    return predictions, configs


def assembled(
    run: Path,
    predictions: Predictions,
    configs: Mapping[str, TrialConfig],
    data: Mapping[int, Data],
    *,
    weights: Mapping[str, Path | None],
    device: torch.device,
) -> Final:
    """The ensemble of kept trials that serves validation best.

    Args:
        run: its folder.
        predictions, configs: of `kept_trials`.
        data: decoded images by size.
        weights: weight file by backbone.
        device: where to predict.

    Raises:
        InputError: weights that don't give the probabilities that the trial had.
    """
    shares = named_shares(predictions)
    probabilities = dict(zip(predictions.trial_ids, predictions.probabilities, strict=True))
    networks = {}
    for trial_id in shares:
        config = configs[trial_id]
        some = data[config.image_size]
        network = _built(config, len(some.classes), weights[config.backbone], best_weights(run, trial_id))
        prepare = preparer(some.images, config.backbone, device)
        again = tempered(predict_images(network.to(device), prepare, some.val[:CHECKED_IMAGES]), 1.0)
        if not np.abs(again - probabilities[trial_id][:CHECKED_IMAGES]).max() < CHECKED_DIFFERENCE:
            raise InputError(
                f"{trial_id}: its kept weights don't give the probabilities that it had in the search, perhaps since "
                "the pretrained weights are others; name the search's by --set weights=FOLDER, or leave ensemble out"
            )
        networks[trial_id] = network.cpu(), config
    found = offer(predictions)
    judged = None if found is None else {"val_loss": found.val_loss, "best_trial_alone": found.alone}
    metrics = {"trained_on": "train", "ensemble": shares, "validation": judged}
    mixture = np.sum([share * probabilities[trial_id] for trial_id, share in shares.items()], axis=0)
    return Final(networks, shares, logarithms(mixture), metrics)


def _built(config: TrialConfig, classes: int, weights: Path | None, changed: Mapping[str, Tensor]) -> nn.Module:
    """A network with the tensors that training has changed."""
    network = backbones.build(
        config.backbone,
        classes=classes,
        image_size=config.image_size,
        head_dropout=config.head_dropout,
        seed=config.seed,
        weights=weights,
    )
    network.load_state_dict(changed, strict=False)
    return network
