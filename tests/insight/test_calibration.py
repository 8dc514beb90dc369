import numpy as np
import pytest

from tuning.insight.calibration import calibration_error


def test_calibration_error_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.98, 0.02], [0.3, 0.7], [0.5, 0.5]])
    # The first two share the last bin: (2 - 1.93) / 4; the third is right: 0.3 / 4; the fourth wrong: 0.5 / 4.
    assert calibration_error(probabilities, np.array([0, 0, 1, 1])) == pytest.approx((0.07 + 0.3 + 0.5) / 4)
    assert calibration_error(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1])) == 0.0
    assert calibration_error(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 0])) == 1.0
