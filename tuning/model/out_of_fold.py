"""Predictions for all images by models that weren't trained on them: cross-validation of one configuration."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from tuning.model.familiar import predicted
from tuning.model.final import train, usual_features
from tuning.record.targets import PRESENT
from tuning.record.temperature import Floats, Ints, fit_temperature, tempered
from tuning.settings.config import InputError, TrialConfig
from tuning.settings.values import Weights
from tuning.training.dataset import Data, preparer
from tuning.training.features import Cache


@dataclasses.dataclass(frozen=True)
class Fold:
    """One part of the images, seen by a model that was trained on the others."""

    rows: Ints
    probabilities: Floats  # [rows, classes], at the temperature that fits these rows best
    unlike: Floats  # [rows], how unlike the others each is, see `familiar`
    val_loss: float


def folds(
    config: TrialConfig,
    data: Data,
    units: Ints,
    count: int,
    *,
    weights: Weights | None,
    device: torch.device,
    features: Cache,
) -> Iterator[Fold]:
    """Train on all folds but one of the training and validation images, in turn, and predict for that one.

    Args:
        units: of all images: those of one unit stay in one fold.
        count: of folds, stratified by class or by the set of labels.

    Raises:
        InputError: there are fewer units than folds, or no epoch of a fold had a finite loss.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # takes a second to load

    rows = np.union1d(data.train, data.val)
    if len(np.unique(units[rows])) < count:
        raise InputError(f"--folds {count}: there are {len(np.unique(units[rows]))} groups of images; give fewer")
    alone = len(np.unique(units[rows])) == len(rows)  # the grouped one is slow
    splitter = (StratifiedKFold if alone else StratifiedGroupKFold)(count, shuffle=True, random_state=config.seed)
    kinds = _kinds(data.labels[rows], count)
    for others, inside in splitter.split(rows, kinds, None if alone else units[rows]):
        part = dataclasses.replace(data, train=rows[others], val=rows[inside])
        final = train(
            config,
            part,
            last=None,
            weights=weights,
            devices=[device],
            metric="val_tempered_loss",
            features=features,
            on_epoch=lambda row: None,
        )
        ((network, _),) = final.networks.values()
        usual = usual_features(network, config, part, device)
        prepare = preparer(part.images, network.to(device), device)
        logits, unlike = predicted(network, prepare, part.val, usual)
        temperature = fit_temperature(logits, part.labels[part.val])
        probabilities = tempered(logits, temperature, multi_label=data.multi_label)
        loss = final.metrics["validation"]["val_loss"]
        yield Fold(rows[inside], probabilities, np.full(len(inside), np.nan) if unlike is None else unlike, float(loss))


def _kinds(targets: Ints, count: int) -> Ints:
    """Return by what images are stratified: their class, or the rarest of their labels; rare ones together."""
    if targets.ndim == 1:
        kinds = targets.copy()
    else:
        positive = targets == PRESENT
        rarest = np.argsort(positive.sum(axis=0), kind="stable")
        kinds = np.where(positive.any(axis=1), positive[:, rarest].argmax(axis=1), targets.shape[1])
    names, numbers = np.unique(kinds, return_counts=True)
    rare = np.isin(kinds, names[numbers < count])
    return np.where(rare, -1, kinds) if rare.sum() >= count else np.where(rare, names[numbers.argmax()], kinds)


def ordered(found: list[Fold]) -> tuple[Ints, Floats, NDArray[np.float64]]:
    """Return the rows of all folds in order, with their probabilities and how unlike the others they are."""
    rows = np.concatenate([fold.rows for fold in found])
    order = np.argsort(rows)
    probabilities = np.concatenate([fold.probabilities for fold in found])
    return rows[order], probabilities[order], np.concatenate([fold.unlike for fold in found])[order]
