"""Pictures are laid over each other, and their details compared."""

import numpy as np
import pytest
from scipy import ndimage

from tuning.checks.alignment import SIDE, agreement, align, bands, details, glance, plausible, resampling

IDENTITY = np.array([[[1, 0, 0], [0, 1, 0]]], dtype=np.float32)
FIRST, SECOND = np.array([0]), np.array([1])


def picture(seed):
    """Shapes of several sizes."""
    rng = np.random.default_rng(seed)
    noise = sum(sigma * ndimage.gaussian_filter(rng.normal(size=(160, 160)), sigma) for sigma in (2, 4, 8))
    return (128 + 60 * noise / noise.std()).clip(0, 255)


def part(whole, left, top, width):
    across, down = (resampling(160, SIDE, start, start + width) for start in (left, top))
    return (down @ whole @ across.T).round().astype(np.uint8)


def test_pixels_are_means_of_what_they_cover():
    assert np.allclose(resampling(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    assert np.allclose(resampling(4, 2, 0.5, 1.0), [[0, 0, 1, 0], [0, 0, 0, 1]])
    assert np.allclose(resampling(10, 3).sum(axis=1), 1)


def test_more_pixels_are_interpolated():
    ramp = np.arange(8.0)
    assert np.allclose((resampling(8, 16) @ ramp)[1:-1], np.arange(16)[1:-1] / 2 - 0.25)


@pytest.mark.parametrize(("left", "top", "width"), [(0.0, 0.0, 1.0), (0.05, 0.05, 0.9), (0.0, 0.05, 0.95)])
def test_a_crop_is_found_and_agrees(left, top, width):
    pictures = np.stack([part(picture(0), 0, 0, 1), part(picture(0), left, top, width)])
    warp, likeness = align(details(pictures, SIDE), FIRST, SECOND, IDENTITY)
    expected = [[width, 0, 2 * left + width - 1], [0, width, 2 * top + width - 1]]
    assert np.abs(warp[0] - expected).max() < 0.02 and likeness[0] > 0.9
    assert plausible(warp).all()
    assert agreement(pictures, FIRST, SECOND, warp)[0][0] > 0.97
    assert glance(bands(pictures), FIRST, SECOND, warp)[0][0] > 0.97


def test_other_pictures_do_not_agree():
    pictures = np.stack([part(picture(seed), 0, 0, 1) for seed in (0, 1)])
    warp, _ = align(details(pictures, SIDE), FIRST, SECOND, IDENTITY)
    assert agreement(pictures, FIRST, SECOND, warp)[0][0] < 0.5
    assert glance(bands(pictures), FIRST, SECOND, warp)[0][0] < 0.5


def test_a_letter_and_blown_out_parts_do_not_matter():
    pictures = np.stack([part(picture(0), 0, 0, 1)] * 2)
    pictures[1] = (1.4 * pictures[1].astype(float)).clip(0, 255)
    pictures[1, 4:14, 4:24] = 0
    assert agreement(pictures, FIRST, SECOND, IDENTITY)[0][0] > 0.99


def test_flat_pictures_agree_in_nothing():
    pictures = np.full((2, SIDE, SIDE), 90, dtype=np.uint8)
    assert agreement(pictures, FIRST, SECOND, IDENTITY)[0][0] == 0
    assert glance(bands(pictures), FIRST, SECOND, IDENTITY)[0][0] < 0.5


def test_a_warp_that_mirrors_shrinks_or_shifts_too_much_is_no_copy():
    warps = np.repeat(IDENTITY, 4, axis=0)
    warps[0, 0, 0] = -1  # mirrored is fine
    warps[1, :, :2] *= 0.7
    warps[2, 0, 2] = 0.5
    warps[3, 0, 1] = 0.9
    assert plausible(warps).tolist() == [True, False, False, False]
