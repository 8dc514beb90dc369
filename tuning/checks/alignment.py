"""Align one picture to another, and measure how far their details agree."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from threadpoolctl import threadpool_limits

from tuning.data.images import parallel_map

Floats: TypeAlias = NDArray[np.float32]
Halves: TypeAlias = NDArray[np.float16]
Bytes: TypeAlias = NDArray[np.uint8]
Ints: TypeAlias = NDArray[np.int64]

SIDE = 64  # of the pictures that are compared, in pixels
FINE, COARSE = 0.7, 2.0  # pixels: between these are the details in which copies agree and look-alikes do not
STEPS = 3  # of an alignment
DENSE = 32  # pixels along a side that an alignment uses; of finer pictures about every second
WHITE = 250  # of 255
FLAT = 0.1  # standard deviation of a window, in levels, below which it has no details
WINDOW = 12  # pixels
LEAST_WINDOWS = 20  # with details, of about 300


def in_batches(function: Callable[..., tuple[Any, ...]], *arrays: NDArray[Any], size: int = 128) -> list[NDArray[Any]]:
    """Apply a function of rows to all of them, a few at a time on all cores."""
    n = len(arrays[0])
    starts = range(0, n, size) or range(1)
    with threadpool_limits(1, user_api="blas"):  # its threads would only slow down ours
        parts = parallel_map(lambda start: function(*(array[start : start + size] for array in arrays)), starts)
        results: list[NDArray[Any]] = []
        for start, part in zip(starts, parts, strict=True):
            results = results or [np.empty((n, *values.shape[1:]), values.dtype) for values in part]
            for result, values in zip(results, part, strict=True):
                result[start : start + size] = values
    return results


def resampling(side: int, wanted: int, start: float = 0.0, stop: float = 1.0) -> Floats:
    """Return weights [wanted, side] that resample the part of a side of `side` pixels from `start` to `stop`.

    Fewer pixels are means of what they cover, more are interpolated.
    """
    edges = np.linspace(start * side, stop * side, wanted + 1)
    pixels = np.arange(side)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    if edges[1] - edges[0] < 1:
        covered = 1 - np.abs((edges[1:, None] + edges[:-1, None]) / 2 - 0.5 - pixels)
    weights = covered.clip(0)
    found: Floats = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return found


def _blurred(pictures: Floats, sigma: float) -> Floats:
    found: Floats = ndimage.gaussian_filter(pictures, (0, sigma, sigma), mode="nearest", truncate=2.5)
    return found


def details(pictures: Bytes, side: int) -> Halves:
    """Return pictures of a smaller side, without coarse shades and with equal contrast everywhere."""
    weights = resampling(SIDE, side)

    def of(part: Bytes) -> tuple[Halves]:
        small = weights @ part.astype(np.float32) @ weights.T
        band = _blurred(small, max(0.5, side / 64)) - _blurred(small, side / 16)
        local = _blurred(band * band, 3 * side / 32)
        whole = (band * band).mean(axis=(1, 2), keepdims=True)
        return ((band / np.sqrt(local + 0.09 * whole + 1e-3)).astype(np.float16),)

    return in_batches(of, pictures)[0]


def bands(pictures: Bytes) -> NDArray[np.int8]:
    """Return details between 0.7 and 2 pixels, in units of 1/32 of their standard deviation over the picture."""

    def of(part: Bytes) -> tuple[NDArray[np.int8]]:
        band = _blurred(part.astype(np.float32), FINE) - _blurred(part.astype(np.float32), COARSE)
        spread = band.std(axis=(1, 2), keepdims=True) + 1e-3
        return ((band / spread * 32).round().clip(-127, 127).astype(np.int8),)

    return in_batches(of, pictures)[0]


def _grid(side: int) -> Floats:
    """x, y and 1 of each pixel's centre, from -1 to 1: [3, side * side]."""
    middles = ((np.arange(side) + 0.5) / side * 2 - 1).astype(np.float32)
    y, x = np.meshgrid(middles, middles, indexing="ij")
    return np.stack([x.ravel(), y.ravel(), np.ones(side * side, dtype=np.float32)])


def _margin(side: int) -> int:
    return round(side * 6 / SIDE)  # pixels whose details the edge has distorted


def align(details: Halves, a: Ints, b: Ints, warp: Floats) -> tuple[Floats, Floats]:
    """Improve affine warps from points in `b` to points in `a`; return them and the correlation of details under them.

    Gauss-Newton steps, inverse compositional: Baker and Matthews 2004, Lucas-Kanade 20 years on.
    """
    side, margin = details.shape[1], _margin(details.shape[1])
    inner = slice(margin, side - margin, max(1, side // DENSE))
    grid = _grid(side).reshape(3, side, side)[:, inner, inner].reshape(3, -1)
    fixed = details[b].astype(np.float32)
    gradient = np.array(np.gradient(fixed, axis=(1, 2)))[:, :, inner, inner] * np.float32(side / 2)
    down, across = gradient.reshape(2, len(b), grid.shape[1])
    fixed = fixed[:, inner, inner].reshape(len(b), grid.shape[1])
    slopes = np.stack([*(across * part for part in grid), *(down * part for part in grid)], axis=1)
    hessian = slopes @ slopes.transpose(0, 2, 1)  # 6 by 6 for each pair
    ridge = np.trace(hessian, axis1=1, axis2=2)[:, None, None] * np.eye(6, dtype=np.float32)
    inverse = np.linalg.inv(hessian + 2e-4 * ridge + 1e-3 * np.eye(6, dtype=np.float32))
    scale = np.sqrt((fixed**2).mean(axis=1, keepdims=True))
    step = np.zeros((len(b), 3, 3), dtype=np.float32)
    for _ in range(STEPS):
        moved, valid = _sampled(details, a, warp, grid, margin)
        error = (_normal(moved, valid) - _normal(fixed, valid)) * scale
        found = (inverse @ (slopes @ error[:, :, None]))[:, :, 0].clip(-0.1, 0.1)
        step[:] = np.eye(3)
        step[:, :2] += found.reshape(-1, 2, 3)
        warp = (warp @ np.linalg.inv(step)).astype(np.float32)
    moved, valid = _sampled(details, a, warp, grid, margin)
    likeness = (_normal(moved, valid) * _normal(fixed, valid)).sum(axis=1) / valid.sum(axis=1).clip(1)
    return warp, likeness


def _sampled(
    details: NDArray[Any], chosen: Ints, warp: Floats, grid: Floats, margin: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Values of the chosen pictures at the warped pixels, and which of these are inside the margin."""
    side = details.shape[1]
    x, y = np.moveaxis((warp @ grid + 1) * np.float32(side / 2) - np.float32(0.5), 1, 0)
    valid = (x >= margin) & (x <= side - 1 - margin) & (y >= margin) & (y <= side - 1 - margin)
    x, y = x.clip(0, side - 1.001), y.clip(0, side - 1.001)
    left, top = x.astype(np.int32), y.astype(np.int32)
    x -= left
    y -= top
    corner = chosen[:, None] * side**2 + top * side + left
    flat = details.reshape(-1)
    first, second, third, fourth = (flat[corner + step].astype(np.float32) for step in (0, 1, side, side + 1))
    upper, lower = first + x * (second - first), third + x * (fourth - third)
    return upper + y * (lower - upper), valid


def _normal(values: Floats, valid: NDArray[np.bool_]) -> Floats:
    """Standardise values over the valid ones; 0 elsewhere."""
    weight = valid.astype(np.float32)
    count = weight.sum(axis=1, keepdims=True).clip(1)
    values = (values - (values * weight).sum(axis=1, keepdims=True) / count) * weight
    normal: Floats = values / (np.sqrt((values**2).sum(axis=1, keepdims=True) / count) + 1e-6)
    return normal


def plausible(warp: Floats) -> NDArray[np.bool_]:
    """Return whether warps may be those of a copy: little skew, a scale of about 3/4 to 4/3, mostly overlapping."""
    sizes = np.linalg.svd(warp[:, :, :2], compute_uv=False)
    sane: NDArray[np.bool_] = (sizes > 0.75) & (sizes < 1.33) & (np.abs(warp[:, :, 2]) < 0.4)
    return sane[:, 0] & sane[:, 1]


def glance(bands: NDArray[np.int8], a: Ints, b: Ints, warp: Floats) -> tuple[Floats]:
    """Return the third best of the correlations of details in nine windows of a pair.

    It takes a tenth of the time of `agreement`, and a coarse alignment is good enough for it.
    """
    starts = np.linspace(_margin(SIDE) + 1, SIDE - _margin(SIDE) - 1 - WINDOW, 3).astype(np.int64)
    numbers = np.arange(SIDE**2).reshape(SIDE, SIDE)
    pixels = np.stack([numbers[y : y + WINDOW, x : x + WINDOW].ravel() for y in starts for x in starts])
    shape, flat = (len(a), *pixels.shape), pixels.ravel()
    moved, valid = _sampled(bands, a, warp, _grid(SIDE)[:, flat], 0)
    fixed = bands.reshape(len(bands), SIDE**2)[b[:, None], flat].astype(np.float32)
    moved, fixed = (values.reshape(shape) for values in (moved, fixed))
    moved, fixed = (values - values.mean(axis=2, keepdims=True) for values in (moved, fixed))
    spreads = [(values**2).mean(axis=2) for values in (moved, fixed)]
    correlation = (moved * fixed).mean(axis=2) / np.sqrt(spreads[0] * spreads[1] + 1e-6)
    telling = valid.reshape(shape).mean(axis=2) > 0.9
    for spread in spreads:
        telling &= spread > 0.1 * spread.mean(axis=1, keepdims=True)
    correlation[~telling] = -1
    return (np.sort(correlation, axis=1)[:, -3],)


def agreement(pictures: Bytes, a: Ints, b: Ints, warp: Floats) -> tuple[Floats]:
    """Return the median correlation of details in small windows of an aligned pair.

    A median, since a copy may have a letter or an arrow drawn on it; windows without details don't count. Pixels that
    are white in only one of the two are ignored: they were blown out when it was made brighter.
    """
    x, y = np.moveaxis((warp @ _grid(SIDE) + 1) * (SIDE / 2) - 0.5, 1, 0)
    moved = np.empty((len(a), SIDE, SIDE), dtype=np.float32)
    for picture, chosen, across, down in zip(moved, a, x, y, strict=True):
        whole = pictures[chosen].astype(np.float32)
        ndimage.map_coordinates(whole, [down, across], picture.reshape(-1), order=3, mode="nearest")
    fixed = pictures[b].astype(np.float32)
    valid = ((x >= 0) & (x <= SIDE - 1) & (y >= 0) & (y <= SIDE - 1)).reshape(moved.shape)
    blown = ndimage.maximum_filter((moved >= WHITE) != (fixed >= WHITE), (1, 3, 3))
    weight = (ndimage.minimum_filter(valid, (1, 3, 3), mode="constant") & ~blown).astype(np.float32)
    moved, fixed = (_band(picture, weight) for picture in (moved, fixed))

    def over(values: Floats) -> Floats:
        sums = ndimage.uniform_filter(values * weight, (0, WINDOW, WINDOW), mode="constant")
        some = sums[:, WINDOW // 2 : -WINDOW // 2 : 3, WINDOW // 2 : -WINDOW // 2 : 3]
        found: Floats = some.reshape(len(a), some.shape[1] * some.shape[2])
        return found

    count = over(np.ones_like(moved)) + 1e-6
    mean_moved, mean_fixed = over(moved) / count, over(fixed) / count
    var_moved, var_fixed = over(moved**2) / count - mean_moved**2, over(fixed**2) / count - mean_fixed**2
    spread = np.sqrt((var_moved + 1e-6) * (var_fixed + 1e-6))
    correlation = (over(moved * fixed) / count - mean_moved * mean_fixed) / spread
    telling = count > 0.5
    for var in (var_moved, var_fixed):
        telling &= var > FLAT**2
        telling &= var > 0.1 * (var * count).sum(axis=1, keepdims=True) / count.sum(axis=1, keepdims=True)
    few = telling.sum(axis=1) < LEAST_WINDOWS
    correlation[~telling | few[:, None]] = np.nan
    correlation[few] = 0.0
    return (np.nanmedian(correlation, axis=1).astype(np.float32),)


def _band(pictures: Floats, weight: Floats) -> Floats:
    """Details like those of `bands`, of weighted pixels alone."""
    fine, coarse = (_blurred(pictures * weight, sigma) / (_blurred(weight, sigma) + 1e-3) for sigma in (FINE, COARSE))
    return (fine - coarse) * weight
