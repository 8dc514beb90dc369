"""The final model before its test: one configuration trained again, or what the search has trained."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from tuning.insight.ensemble import Offer
from tuning.model import familiar
from tuning.model.folder import build_network
from tuning.record import tables
from tuning.record.journal import best_epoch
from tuning.record.predictions import Predictions, read_predictions
from tuning.record.temperature import logarithms, tempered
from tuning.search.checkpoints import best_weights, kept
from tuning.settings.config import InputError, TrialConfig
from tuning.settings.values import Weights
from tuning.training import backbones
from tuning.training.dataset import Data, preparer
from tuning.training.distributed import finetune_on_all
from tuning.training.features import Cache
from tuning.training.folding import fold
from tuning.training.scores import predict_images
from tuning.training.state import Row

CHECKED_IMAGES, CHECKED_DIFFERENCE = 16, 0.05  # kept weights must reproduce their trial's stored probabilities


@dataclasses.dataclass(frozen=True)
class Final:
    """Networks whose probabilities are averaged, with their metrics."""

    networks: dict[str, tuple[nn.Module, TrialConfig]]  # by trial; a single network has the empty name
    shares: dict[str, float]  # weight of each network in the average
    validated: NDArray[Any] | None  # validation logits [images, classes]; None if trained on validation too
    metrics: dict[str, Any]  # for metrics.json

    def logits(self, data: Mapping[int, Data], split: str, device: torch.device) -> NDArray[Any]:
        """Return logits [images, classes] of a split, for an ensemble log-probabilities; `data` is by image size."""
        each, several = [], False
        for network, config in self.networks.values():
            images = data[config.image_size]
            each.append(_logits(network, images, getattr(images, split), device))
            several = images.multi_label
        if len(each) == 1:
            return each[0]
        found = [tempered(logits, 1.0, multi_label=several) for logits in each]
        return _mixture(self.shares, found, multi_label=several)


def train(
    config: TrialConfig,
    data: Data,
    *,
    last: int | None,
    weights: Weights | None,
    devices: Sequence[torch.device],
    metric: str,
    features: Cache,
    on_epoch: Callable[[Row], None],
    graphs: bool = False,
) -> Final:
    """Train on the training set and keep the best epoch, or train on training and validation sets up to epoch `last`.

    The learning rate schedule covers all `config.epochs` either way, as it did when the search found `last`.

    Raises:
        InputError: no epoch had a finite loss.
    """
    both = last is not None
    if both:
        data = dataclasses.replace(data, train=np.union1d(data.train, data.val))
    how: dict[str, Any] = {"weights": weights, "metric": metric, "graphs": graphs}
    for row, snapshot in finetune_on_all(devices, config, data, features=features, **how):
        on_epoch(row)
        if row["epoch"] == last or row["ends"] is not None:
            state = snapshot()
            break
    best = state.history[-1] if both else best_epoch(state.history, metric)
    if best is None or best["val_loss"] is None:
        raise InputError("no epoch had a finite loss; lower the learning rate by --set learning_rate=...")
    part = "model/" if both else "best/"
    changed = {name.removeprefix(part): tensor for name, tensor in state.tensors.items() if name.startswith(part)}
    network = folded_network(config, len(data.classes), weights)
    network.load_state_dict(changed, strict=False)
    metrics = {
        "trained_on": "train+val" if both else "train",
        "epochs": best["epoch"],
        "validation": None if both else {name: best[name] for name in best if name.startswith("val_")},
        "train_eval_loss": best["train_eval_loss"],
    }
    validated = None if both else state.tensors["validation/logits"].numpy()
    return Final({"": (network, config)}, {"": 1.0}, validated, metrics)


@dataclasses.dataclass(frozen=True)
class Kept:
    """Trials of a search whose best weights were kept, with their validation probabilities."""

    run: Path
    predictions: Predictions
    configs: dict[str, TrialConfig]
    rows: pd.DataFrame  # of the table of trials, by trial_id
    gained: Offer | None = None  # by the mean of those that were selected among all

    def of(self, trial_ids: Sequence[str]) -> "Kept":
        """Return some of the trials, in this order."""
        configs = {trial_id: self.configs[trial_id] for trial_id in trial_ids}
        return dataclasses.replace(self, predictions=self.predictions.of(trial_ids), configs=configs)


def kept_trials(run: Path, samples: pd.DataFrame) -> Kept:
    """Return the trials of a run that have both their best weights and their validation probabilities.

    Raises:
        InputError: the run has no tables.
    """
    trials = tables.read_table(run / "trials.parquet")
    trials = trials[trials["origin"] != "probe"]
    configs = kept(run, trials)
    predictions = read_predictions(run, trials[trials["trial_id"].isin(list(configs))], samples)
    return Kept(run, predictions, configs, trials.set_index("trial_id"))


def assemble(
    chosen: Kept, data: Mapping[int, Data], *, weights: Mapping[str, Weights | None], device: torch.device
) -> Final:
    """Build the model of one kept trial, or the mean of several; data is by image size, weights by backbone.

    Raises:
        InputError: kept weights don't reproduce their trial's probabilities.
    """
    probabilities = dict(zip(chosen.predictions.trial_ids, chosen.predictions.probabilities, strict=True))
    networks = {}
    for trial_id, config in chosen.configs.items():
        images = data[config.image_size]
        network = folded_network(config, len(images.classes), weights[config.backbone])
        network.load_state_dict(best_weights(chosen.run, trial_id), strict=False)
        logits = _logits(network, images, images.val[:CHECKED_IMAGES], device)
        again = tempered(logits, 1.0, multi_label=images.multi_label)
        if not np.abs(again - probabilities[trial_id][:CHECKED_IMAGES]).max() < CHECKED_DIFFERENCE:
            raise InputError(
                f"{trial_id}: its kept weights do not reproduce its probabilities in the search, perhaps because the "
                "pretrained weights differ; give the search's by --set weights=FOLDER, or train by --set epochs=..."
            )
        networks[trial_id] = network.cpu(), config
    metrics: dict[str, Any] = {"trained_on": "train"}
    if len(networks) == 1:
        ((trial_id, network_of),) = networks.items()
        row = chosen.rows.loc[trial_id]
        scores = {name: row[name] for name in row.index if name.startswith("val_")}
        metrics |= {"epochs": int(row["best_epoch"]), "train_eval_loss": _number(row["train_eval_loss"])}
        metrics |= {"validation": {name: _number(value) for name, value in scores.items()}, "taken_from": trial_id}
        validated = logarithms(probabilities[trial_id], multi_label=chosen.predictions.multi_label)
        return Final({"": network_of}, {"": 1.0}, validated, metrics)
    shares = dict.fromkeys(networks, 1 / len(networks))
    gained, validation = chosen.gained, None
    if gained is not None:
        validation = {"val_tempered_loss": gained.val_tempered_loss, "best_trial_alone": gained.alone}
    metrics |= {"ensemble": shares, "validation": validation}
    found, several = [probabilities[trial_id] for trial_id in shares], chosen.predictions.multi_label
    return Final(networks, shares, _mixture(shares, found, multi_label=several), metrics)


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


def folded_network(config: TrialConfig, classes: int, weights: Weights | None) -> nn.Module:
    """Build a network whose batch norms are folded, for evaluation and export on the CPU."""
    network = build_network(config, classes, weights)
    fold(network, backbones.stages(network, config.image_size), config.image_size)
    return network


def usual_features(network: nn.Module, config: TrialConfig, data: Data, device: torch.device) -> familiar.Fitted | None:
    """Return what tells images unlike those of training, by some of them and of validation; None if it can't be had.

    Any failure is printed: the model is complete without it. The network is moved to the device.
    """
    try:
        names = familiar.taps(network, config.image_size)
        trained = np.setdiff1d(data.train, data.val)
        trained, validated = (
            np.sort(np.random.default_rng(0).permutation(rows)[: familiar.MOST_IMAGES]) for rows in (trained, data.val)
        )
        features = []
        for rows in (trained, validated):
            with familiar.recorded(network, names) as seen:
                _logits(network, data, rows, device)
            features.append(familiar.joined(seen, len(rows)))
        return familiar.fit(features[0], features[1], names)
    except Exception as error:
        print(f"images unlike those of training can't be told ({type(error).__name__}: {error})", file=sys.stderr)
        return None


def _logits(network: nn.Module, data: Data, indices: NDArray[np.int64], device: torch.device) -> NDArray[Any]:
    return predict_images(network.to(device), preparer(data.images, network, device), indices)


def _mixture(
    shares: Mapping[str, float], probabilities: Iterable[NDArray[np.float64]], *, multi_label: bool
) -> NDArray[np.float64]:
    """Return the `logarithms` of a weighted average of probabilities."""
    weighted = [share * values for share, values in zip(shares.values(), probabilities, strict=True)]
    return logarithms(np.sum(weighted, axis=0), multi_label=multi_label)
