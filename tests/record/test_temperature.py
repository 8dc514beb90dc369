import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, softmax

from tuning.insight.calibration import calibration_error
from tuning.record.temperature import (
    TEMPERATURES,
    fit_temperature,
    image_losses,
    logarithms,
    median_temperature,
    plain,
    tempered,
    tempered_loss,
)


def drawn(temperature, count=2000):
    """Logits whose classes are drawn from them at a temperature."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (count, 3))
    chances = softmax(logits / temperature, axis=1).cumsum(axis=1)
    return logits, (rng.random((count, 1)) > chances).sum(axis=1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 5.0])
def test_a_temperature_is_found_again_and_calibrates(temperature):
    logits, targets = drawn(temperature)
    found = fit_temperature(logits, targets)
    assert found == pytest.approx(temperature, rel=0.15)
    assert calibration_error(tempered(logits, found), targets) < 0.05
    assert fit_temperature(logarithms(tempered(logits, 1.0)), targets) == pytest.approx(found, rel=1e-3)


def test_classes_told_apart_without_a_fault_have_a_finite_temperature():
    targets = np.arange(50) % 2
    logits = np.stack([-targets, targets], axis=1) * 4.0
    assert 0.5 < fit_temperature(logits, targets) < 2
    assert fit_temperature(logits * 10, targets) == pytest.approx(10 * fit_temperature(logits, targets), rel=1e-3)


@given(st.floats(0.05, 20))
def test_a_temperature_changes_no_order_of_classes(temperature):
    logits, _ = drawn(1.0, 50)
    found = tempered(logits.astype(np.float32), temperature)
    assert found.sum(axis=1) == pytest.approx(1)
    assert np.array_equal(found.argmax(axis=1), logits.argmax(axis=1))


def test_the_logarithm_of_nothing_is_finite():
    assert np.isfinite(logarithms(np.array([[0.0, 1.0]]))).all()


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_the_tempered_loss_does_not_depend_on_the_scale(scale):
    logits, targets = drawn(1.0)
    found = tempered_loss(logits * scale, targets)
    plain = -logarithms(tempered(logits, 1.0))[np.arange(len(targets)), targets].mean()
    assert found == pytest.approx(tempered_loss(logits, targets), abs=1e-5) and found <= plain + 1e-4


def drawn_labels(temperatures, count=3000, unknown=0.2):
    """Logits whose labels are drawn from them at a temperature for each; some are unknown."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 3, (count, len(temperatures)))
    targets = (rng.random(logits.shape) < expit(logits / np.array(temperatures))).astype(np.int64)
    return logits, np.where(rng.random(logits.shape) < unknown, -1, targets)


def test_each_label_has_the_temperature_that_fits_it_best():
    truth = [0.4, 1.0, 3.0]
    logits, targets = drawn_labels(truth)
    found = fit_temperature(logits, targets)
    assert found == pytest.approx(truth, rel=0.15)
    for place in range(3):
        known = targets[:, place] >= 0
        values, wanted, smoothing = logits[known, place], targets[known, place], 1 / (known.sum() + 2)

        def loss(log_temperature, values=values, wanted=wanted * (1 - smoothing) + smoothing / 2):
            scaled = values / np.exp(log_temperature)
            return (np.logaddexp(0, scaled) - wanted * scaled).sum()

        best = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-8})
        assert found[place] == pytest.approx(np.exp(best.x), rel=1e-4)
    probabilities = tempered(logits, found, multi_label=True)
    assert calibration_error(probabilities, targets) < 0.05
    assert tempered_loss(logits, targets) == pytest.approx(image_losses(probabilities, targets).mean(), abs=1e-4)
    again = fit_temperature(logarithms(tempered(logits, 1.0, multi_label=True), multi_label=True), targets)
    assert again == pytest.approx(found, rel=1e-3)


def test_losses_of_images_have_the_loss_as_their_mean():
    logits, targets = drawn_labels([1.0, 1.0])
    probabilities = tempered(logits, 1.0, multi_label=True)
    right = np.where(targets == 1, probabilities, 1 - probabilities)[targets >= 0]
    assert image_losses(probabilities, targets).mean() == pytest.approx(-np.log(right).mean())
    assert np.isfinite(image_losses(np.array([[1.0, 0.0]]), np.array([[0, 1]]))).all()
    assert np.isfinite(logarithms(np.array([[0.0, 1.0]]), multi_label=True)).all()


def test_the_median_temperature_is_that_of_each_label():
    assert median_temperature([]) == 1.0 and median_temperature([1.0, 3.0, 2.0]) == 2.0
    of_labels = median_temperature([np.array([1.0, 4.0]), np.array([3.0, 2.0]), np.array([2.0, 9.0])])
    assert plain(of_labels) == [2.0, 4.0] and plain(1.5) == 1.5
