"""Linear probes are what they are called, and a good head to start from."""

import numpy as np
import pytest
import torch
from shared import CPU, make_data
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from tuning.settings.config import TrialConfig
from tuning.training.features import FeatureCache
from tuning.training.finetune import finetune
from tuning.training.probe import DECAYS, fit_head, probe

CLASS_ENTROPY = 0.693  # nats, of two classes of equal size


def config(**values):
    return TrialConfig(backbone="test_resnet", image_size=32, batch_size=8, epochs=1, augmentation="none", **values)


def test_each_penalty_gives_the_logistic_regression_that_scikit_learn_finds():
    rng = np.random.default_rng(0)
    targets = np.arange(90) % 3
    features = (rng.normal(size=(90, 5)) + targets[:, None]) * [1, 10, 0.1, 3, 1] + 7
    standard = (features - features.mean(axis=0)) / features.std(axis=0, ddof=1)
    inputs, wanted = torch.tensor(features, dtype=torch.float32), torch.from_numpy(targets)
    for decay, (weight, bias) in zip(DECAYS, fit_head(inputs, wanted, 3), strict=True):
        reference = LogisticRegression(C=1 / (decay * len(targets)), max_iter=1000).fit(standard, targets)
        ours = torch.softmax(inputs @ weight.T + bias, dim=1).numpy()
        assert np.abs(ours - reference.predict_proba(standard)).max() < 0.01


@pytest.mark.slow
def test_few_images_with_many_features_do_not_make_the_best_probe_worse_than_the_class_frequencies():
    losses = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        targets = torch.from_numpy(rng.permutation(np.arange(80) % 2))
        scattered = rng.normal(size=(80, 24)) @ rng.normal(size=(24, 512)) + rng.normal(size=(80, 512))
        features = torch.tensor(scattered, dtype=torch.float32)
        fitted = fit_head(features[:40], targets[:40], 2)
        losses.append(min(float(functional.cross_entropy(features[40:] @ w.T + b, targets[40:])) for w, b in fitted))
    assert max(losses) < 1.05 * CLASS_ENTROPY  # with penalties of at most 1 they were 1.5 to 2.1 times as high


def test_a_probe_is_a_row_like_that_of_an_epoch(tmp_path):
    row = probe(config(), make_data(), device=CPU, weights=None)
    epoch, _ = next(finetune(config(), make_data(), device=CPU, weights=None))
    assert row.keys() == epoch.keys()
    assert row["val_loss"] < CLASS_ENTROPY / 2 and row["ends"] == "completed"
    cached = probe(config(), make_data(), device=CPU, weights=None, features=FeatureCache(tmp_path, 10**9))
    timed = {name for name in row if name.endswith("seconds")} | {"latency_ms"}
    assert {name: cached[name] for name in row.keys() - timed} == {name: row[name] for name in row.keys() - timed}


@pytest.mark.parametrize("depth", [1, 5])
def test_fine_tuning_can_start_from_the_probe(depth):
    probed = probe(config(), make_data(), device=CPU, weights=None)
    still = {"unfreeze_depth": depth, "learning_rate": 1e-12, "batch_norm": "frozen"}
    begun, _ = next(finetune(config(head_init="probe", **still), make_data(), device=CPU, weights=None))
    assert begun["val_loss"] == pytest.approx(probed["val_loss"], rel=1e-4)
    random, _ = next(finetune(config(**still), make_data(), device=CPU, weights=None))
    assert random["val_loss"] > 1.5 * begun["val_loss"]


def test_a_head_that_is_trained_alone_is_initialised_at_random():
    rows = [
        next(finetune(config(head_init=init), make_data(), device=CPU, weights=None))[0] for init in ("probe", "random")
    ]
    assert functional.mse_loss(*(torch.tensor(row["val_loss"]) for row in rows)) == 0
