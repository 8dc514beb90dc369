import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from tuning.insight.calibration import calibration_error
from tuning.record.temperature import fit_temperature, logarithms, tempered, tempered_loss


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
