"""Losses and figures of predictions, of classes and of several labels; what is unknown counts for nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, log_loss, roc_auc_score
from torch.nn import functional

from tuning.training.probe import fit_head
from tuning.training.scores import calibrated_loss, class_weights, loss_sum, mean_loss, score, target_weight


def drawn(images=200, labels=3, unknown=0.2, seed=0):
    """Logits that say something of labels, some of which are unknown."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((images, labels)) < [0.5, 0.2, 0.1][:labels]).astype(np.int64)
    logits = (rng.normal(size=truth.shape) + 2 * truth - 1).astype(np.float32)
    return logits, np.where(rng.random(truth.shape) < unknown, -1, truth)


def test_figures_of_labels_are_means_over_what_is_known_of_each():
    logits, targets = drawn()
    found = score(logits, targets)
    known = [np.flatnonzero(column >= 0) for column in targets.T]
    each = list(zip(known, logits.T, targets.T, strict=True))
    assert found["auroc"] == pytest.approx(np.mean([roc_auc_score(y[rows], z[rows]) for rows, z, y in each]))
    balanced = [balanced_accuracy_score(y[rows], z[rows] > 0) for rows, z, y in each]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(balanced))
    assert found["auprc"] == pytest.approx(np.mean([average_precision_score(y[rows], z[rows]) for rows, z, y in each]))
    assert found["f1"] == pytest.approx(np.mean([f1_score(y[rows], z[rows] > 0) for rows, z, y in each]))
    assert found["sensitivity_at_95"] < found["sensitivity_at_90"] < 1
    cells = targets >= 0
    assert found["loss"] == pytest.approx(log_loss(targets[cells], expit(logits[cells].astype(float))), rel=1e-5)
    assert found["accuracy"] == pytest.approx(((logits > 0) == targets)[cells].mean())
    assert found["tempered_loss"] <= found["loss"] + 1e-6
    assert calibrated_loss(logits, targets) <= found["loss"] + 0.02


def test_a_label_without_positives_leaves_auroc_open():
    logits, targets = drawn(unknown=0)
    targets[:, 1] = 0
    found = score(logits, targets)
    assert found["auroc"] is None and found["loss"] is not None
    assert score(np.full_like(logits, np.nan), targets) == dict.fromkeys(found)


@given(st.integers(0, 1000), st.floats(0, 0.5), st.booleans())
def test_unknown_labels_have_neither_loss_nor_gradient(seed, smoothing, weighted):
    logits, targets = drawn(images=12, unknown=0.5, seed=seed)
    weights = class_weights(targets, 3) if weighted else None
    inputs, wanted = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(targets)
    loss = loss_sum(inputs, wanted, weights, smoothing) / target_weight(wanted, weights)
    loss.backward()
    assert (inputs.grad[wanted < 0] == 0).all() and (inputs.grad[wanted >= 0] != 0).all()
    other = inputs.detach().clone()
    other[wanted < 0] = 100.0
    again, before = (float(loss_sum(each, wanted, weights, smoothing)) for each in (other, inputs.detach()))
    assert again == pytest.approx(before)


def test_the_loss_of_labels_is_that_of_pytorch():
    logits, targets = drawn(unknown=0)
    expected = functional.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(targets).float())
    assert mean_loss(logits, targets) == pytest.approx(float(expected), rel=1e-6)
    nothing = torch.full((4, 3), -1)
    assert float(loss_sum(torch.zeros(4, 3), nothing) / target_weight(nothing, None)) == 0.0


def test_balanced_weights_make_both_sides_of_a_label_count_alike():
    _, targets = drawn(unknown=0)
    weights = class_weights(targets, 3)
    for place in range(3):
        sides = [float(weights[side, place]) * (targets[:, place] == side).sum() for side in (0, 1)]
        assert sides[0] == pytest.approx(sides[1])
    assert class_weights(np.array([0, 0, 0, 1]), 2).tolist() == pytest.approx([4 / 6, 2.0])


def test_a_probe_of_labels_is_a_regression_for_each():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(300, 5)).astype(np.float32))
    truth = (features[:, :2] + 0.5 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) > 0).long()
    both = list(fit_head(features, truth, 2))
    for place in range(2):
        alone = list(fit_head(features, truth[:, [place]], 1))
        for (weight, bias), (own, own_bias) in zip(both[2:5], alone[2:5], strict=True):
            torch.testing.assert_close(weight[[place]], own, atol=2e-2, rtol=2e-2)
            torch.testing.assert_close(bias[[place]], own_bias, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_a_mixed_image_is_that_of_both_labels_by_their_shares(weighted):
    rng = np.random.default_rng(0)
    logits, shares = torch.from_numpy(rng.normal(size=(40, 3))), torch.from_numpy(rng.random(40))
    own, other = (torch.from_numpy(rng.integers(0, 3, 40)) for _ in range(2))
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) if weighted else None
    parts = ((own, shares), (other, 1 - shares))
    loss = sum(loss_sum(logits, wanted, weights, 0.1, share) for wanted, share in parts)
    soft = shares[:, None] * functional.one_hot(own, 3) + (1 - shares)[:, None] * functional.one_hot(other, 3)
    wanted = functional.cross_entropy(logits, soft, weight=weights, label_smoothing=0.1, reduction="sum")
    assert float(loss) == pytest.approx(float(wanted))
    total = sum(target_weight(wanted, weights, share) for wanted, share in parts)
    assert float(total) == pytest.approx(40 if weights is None else float((soft * weights).sum()))


def test_of_mixed_labels_unknown_ones_have_no_part():
    logits, targets = (torch.from_numpy(each) for each in drawn(images=12, unknown=0.5))
    shares = torch.linspace(0.1, 0.9, 12)
    cells = (targets >= 0) * shares[:, None]
    each = functional.binary_cross_entropy_with_logits(logits, (targets == 1).float(), reduction="none")
    assert float(loss_sum(logits, targets, shares=shares)) == pytest.approx(float((each * cells).sum()))
    assert float(target_weight(targets, None, shares)) == pytest.approx(float(cells.sum()))
